"""Bytes a token: compared with numbers worked out by hand, and with the store's size where everything is read."""

from dataclasses import replace

import pytest

from hybrid_kernels.activation import Activation
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.benchmarking.bytes_touched import NeuronRows, all_neurons, bytes_touched, num_parameters
from hybrid_runtime.config import ModelConfig, RopeConfig
from hybrid_runtime.store.layout import Quantization
from hybrid_runtime.store.manifest import Manifest

MISTRAL = ModelConfig(
    family="mistral",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=32768,
    activation=Activation("silu_glu"),
    norm_eps=1e-5,
    rope=RopeConfig(10_000.0),
)
Q4_ROW, Q8_ROW = 2304, 4352  # bytes of 4096 weights in groups of 32, as row_format.py says
BY_LAYER = {f"layers.{idx}.mlp": 1024 for idx in range(32)}


def manifest_of(config, ranks=None, row_format=RowFormat("q4", 32)):  # noqa: B008  # frozen
    return Manifest("m", config, Quantization(row_format), ranks or {}, "data-0123456789abcdef", {}, "x")


def touched(manifest, rows=None, *, uses_predictor=False, mean_length=0.0, kv_dtype="f16"):
    rows = rows or all_neurons(manifest)
    return bytes_touched(
        manifest, rows, uses_predictor=uses_predictor, mean_length=mean_length, kv_dtype=kv_dtype
    ).by_part()


def test_a_dense_7b_by_hand():
    parts = touched(manifest_of(MISTRAL), mean_length=100.5)
    assert parts == {
        "embedding": Q8_ROW,
        "norms": (2 * 32 + 1) * 4096 * 4,
        "attention": 32 * ((4096 + 1024 + 4096) * Q4_ROW + 1024 * Q8_ROW),
        "router": 0,
        "predictor": 0,
        "neurons": 32 * 3 * 14336 * Q4_ROW,
        "head": 32000 * Q8_ROW,
        "kv_cache": 100.5 * 32 * 2 * 8 * 128 * 2,
    }


@pytest.mark.parametrize("kind", ["f32", "q4"])
def test_a_dense_model_touches_its_whole_store_but_the_embedding_table(kind):
    manifest = manifest_of(MISTRAL, row_format=RowFormat(kind, 32 if kind == "q4" else 0))
    embed, *rest = manifest.parts
    parts = touched(manifest)
    assert embed.num_bytes == 32000 * parts["embedding"]
    assert sum(parts.values()) - parts["embedding"] == sum(part.num_bytes for part in rest)


def test_a_tied_model_reads_the_embedding_as_its_head():
    parts = touched(manifest_of(replace(MISTRAL, tie_word_embeddings=True)))
    assert parts["head"] == 32000 * Q8_ROW


def test_a_predictor_counts_only_where_it_is_asked():
    manifest = manifest_of(replace(MISTRAL, predictor_input="post_norm"), BY_LAYER)
    fc1, fc2 = 1024 * Q4_ROW, 14336 * 576
    assert touched(manifest, uses_predictor=True)["predictor"] == 32 * (fc1 + fc2)
    assert touched(manifest)["predictor"] == 0


def test_rows_count_as_they_were_read():
    assert touched(manifest_of(MISTRAL), NeuronRows(5, 3, 2))["neurons"] == 10 * Q4_ROW


def test_a_mixture_reads_the_experts_it_chose():
    config = replace(MISTRAL, num_experts=8, num_experts_per_tok=2, predictor_input="post_norm")
    ranks = {f"layers.{layer}.mlp.experts.{expert}": 512 for layer in range(32) for expert in range(8)}
    parts = touched(manifest_of(config, ranks), uses_predictor=True)
    assert parts["router"] == 32 * 8 * 4096 * 4
    assert parts["neurons"] == 32 * 2 * 3 * 14336 * Q4_ROW
    assert parts["predictor"] == 32 * 2 * (512 * Q4_ROW + 14336 * 320)


def test_opt_has_no_gate_and_reads_biases_and_a_position():
    config = replace(
        MISTRAL,
        activation=Activation("relu"),
        norm="layer",
        rope=None,
        learned_position_offset=2,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )
    parts = touched(manifest_of(config), NeuronRows(0, 100, 10))
    assert parts["embedding"] == 2 * Q8_ROW
    assert parts["norms"] == (2 * 32 + 1) * 2 * 4096 * 4
    assert parts["attention"] == 32 * ((4096 + 1024 + 4096) * (Q4_ROW + 4) + 1024 * (Q8_ROW + 4))
    assert parts["neurons"] == 100 * (Q4_ROW + 4) + 10 * Q4_ROW + 32 * 4096 * 4
    assert all_neurons(manifest_of(config)) == NeuronRows(0, 32 * 14336, 32 * 14336)


def test_a_sliding_window_bounds_what_is_read_of_the_cache():
    config = replace(MISTRAL, sliding_windows=(64, None) * 16)
    position = 2 * 8 * 128 * 4
    parts = touched(manifest_of(config), mean_length=1000, kv_dtype="f32")
    assert parts["kv_cache"] == 16 * (64 + 1000) * position


def test_parameters_are_the_published_number():
    assert num_parameters(manifest_of(MISTRAL)) == 7_241_732_096
