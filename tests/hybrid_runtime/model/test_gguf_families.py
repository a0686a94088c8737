"""GGUF and PWRI files: the logits of the model that they were made from."""

from __future__ import annotations

import math
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from hybrid_kernels.quantization.op import dequantize_rows
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.errors import CheckpointError, UnsupportedModel
from hybrid_runtime.model.weights import load_weights
from hybrid_runtime.store.blocks import CheckpointWeights
from hybrid_runtime.store.convert import Conversion, convert
from hybrid_runtime.store.layout import Quantization

from .gguf_models import write_gguf
from .oracles import SAFE_MARGIN, Oracle, Tally, dense_ffn, drelu, relu_glu
from .published_models import HEADS, INTER, KV_HEADS, RANKS, SPARSE_LLAMA, TURBOSPARSE_MISTRAL, VOCAB, dense_tensors
from .tiny_models import F32, TELLING, TOLERANCE, difference, largest_difference, load, logits_of, random_tokens
from .transformers_models import NO_HEAD_DIM, SIZES, YARN, Case, build_model, logits_of_model

MIXTRAL = SIZES | {"num_local_experts": 3, "num_experts_per_tok": 2}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 32,
}


def published(model):
    """The model's tensors and config as save_pretrained would publish them, with the experts apart."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("mlp.experts.gate_up_proj"):
            moe = name.replace("mlp.experts.gate_up_proj", "block_sparse_moe.experts")
            for idx, both in enumerate(tensor):
                tensors[f"{moe}.{idx}.w1.weight"], tensors[f"{moe}.{idx}.w3.weight"] = both.chunk(2)
        elif name.endswith("mlp.experts.down_proj"):
            moe = name.replace("mlp.experts.down_proj", "block_sparse_moe.experts")
            tensors |= {f"{moe}.{idx}.w2.weight": each for idx, each in enumerate(tensor)}
        elif name != "lm_head.weight" or not model.config.tie_word_embeddings:
            tensors[name.replace("mlp.gate.weight", "block_sparse_moe.gate.weight")] = tensor
    return model.config.to_dict(), tensors


def difference_of_file(tmp_path, kind, settings, **options):
    """Between our logits through a GGUF file and transformers'."""
    model = build_model(Case("", kind, settings))
    config, tensors = published(model)
    path = write_gguf(tmp_path / "tiny.gguf", config, tensors, **options)
    tokens = random_tokens(config["vocab_size"])
    loaded = load(path, tmp_path / "store")
    expected = logits_of_model(model, tokens)
    assert expected.std() > 0.3
    return max(difference(loaded, tokens, expected), difference(loaded, tokens, expected, chunk=7, num_steps=1))


def test_published_gives_back_the_experts(tmp_path):
    config, tensors = published(build_model(Case("", "Mixtral", MIXTRAL)))
    assert tensors["model.layers.2.block_sparse_moe.experts.2.w1.weight"].shape == (51, 36)
    assert config["num_local_experts"] == 3


CASES = {
    "llama-permuted": ("Llama", SIZES, {}),
    "llama-permuted-kv1": ("Llama", SIZES | {"num_key_value_heads": 1}, {}),
    "llama-permuted-kv4": ("Llama", SIZES | {"num_key_value_heads": 4}, {}),
    "llama-tied": ("Llama", SIZES | {"tie_word_embeddings": True}, {}),
    "llama-biases": ("Llama", SIZES | {"attention_bias": True}, {}),
    "llama-linear": (
        "Llama",
        SIZES | {"rope_parameters": LINEAR},
        {"extra": {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0}},
    ),
    "llama-linear-old-key": ("Llama", SIZES | {"rope_parameters": LINEAR}, {"extra": {"rope.scale_linear": 3.0}}),
    "llama-yarn": ("Llama", SIZES | {"rope_parameters": YARN}, {"extra": YARN_KEYS}),
    "llama-yarn-betas": (
        "Llama",
        SIZES | {"rope_parameters": YARN | {"beta_fast": 0.8, "beta_slow": 0.1}},
        {"extra": YARN_KEYS | {"rope.scaling.yarn_beta_fast": 0.8, "rope.scaling.yarn_beta_slow": 0.1}},
    ),
    "llama-yarn-attention-factor": (
        "Llama",
        SIZES | {"rope_parameters": YARN | {"attention_factor": 1.5 * (0.1 * math.log(4) + 1)}},
        {"extra": YARN_KEYS | {"rope.scaling.attn_factor": 1.5}},
    ),
    "mistral-W5": ("Mistral", SIZES | {"sliding_window": 5}, {}),
    "mixtral-stacked": ("Mixtral", MIXTRAL, {}),
    "mixtral-apart": ("Mixtral", MIXTRAL, {"stacked": False}),
    "mixtral-theta": ("Mixtral", MIXTRAL | {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}, {}),
    "qwen2": ("Qwen2", NO_HEAD_DIM, {"arch": "qwen2"}),
    "qwen2-tied": ("Qwen2", NO_HEAD_DIM | {"tie_word_embeddings": True}, {"arch": "qwen2"}),
    "qwen2-yarn": ("Qwen2", NO_HEAD_DIM | {"rope_parameters": YARN}, {"arch": "qwen2", "extra": YARN_KEYS}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_gguf_file_has_the_logits_of_its_hugging_face_model(tmp_path, name):
    kind, settings, options = CASES[name]
    assert difference_of_file(tmp_path, kind, settings, **options) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama-linear", "llama-yarn", "llama-yarn-betas", "llama-yarn-attention-factor"])
def test_the_comparison_sees_a_scaling_that_is_ignored(tmp_path, name):
    kind, settings, _ = CASES[name]
    assert difference_of_file(tmp_path, kind, settings) > TELLING


def test_the_comparison_sees_rows_that_are_left_in_their_order(tmp_path):
    """A llama's permuted q and k read as a qwen2's: the logits differ, so the order that we restore matters."""
    model = build_model(Case("", "Qwen2", NO_HEAD_DIM))
    config, tensors = published(model)
    tokens = random_tokens(VOCAB)
    loaded = load(write_gguf(tmp_path / "tiny.gguf", config, tensors, arch="llama"), tmp_path / "store")
    expected = logits_of_model(model, tokens)
    assert largest_difference(logits_of(loaded, tokens), expected) <= TOLERANCE
    kept = replace(loaded.checkpoint, interleaved_heads={})
    store = convert(Conversion(CheckpointWeights(kept), tmp_path / "kept", Quantization(F32), "tiny", lambda _: None))
    assert largest_difference(logits_of(loaded, tokens, weights=load_weights(store)), expected) > TELLING


def llama3_factors(rope, head_dim):
    """LlamaModel.generate_extra_tensors of convert_hf_to_gguf.py."""
    low, high, trained = (
        rope[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    factors = []
    for frequency in 1.0 / (rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)):
        wavelength = 2 * math.pi / frequency
        if wavelength < trained / high:
            factors.append(1.0)
        elif wavelength > trained / low:
            factors.append(rope["factor"])
        else:
            smooth = (trained / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def test_rope_freqs_stand_for_llama3_scaling(tmp_path):
    settings = SIZES | {"rope_parameters": LLAMA3}
    factors = llama3_factors(LLAMA3, SIZES["head_dim"])
    assert factors[0] == 1.0
    assert factors[-1] == 8.0
    assert any(1 < each < 8 for each in factors)
    assert difference_of_file(tmp_path, "Llama", settings, also={"rope_freqs.weight": factors}) <= TOLERANCE
    (tmp_path / "without").mkdir()
    assert difference_of_file(tmp_path / "without", "Llama", settings) > TELLING


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize(("kind", "settings"), [("Llama", SIZES), ("Mixtral", MIXTRAL)], ids=["llama", "mixtral"])
def test_half_precision_files_have_the_logits_of_the_rounded_weights(tmp_path, dtype, kind, settings):
    model = build_model(Case("", kind, settings))
    tokens = random_tokens(SIZES["vocab_size"])
    before = logits_of_model(model, tokens)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith("mlp.gate.weight"):
                parameter.copy_(parameter.to(torch.float16 if dtype == "F16" else torch.bfloat16))
    config, tensors = published(model)
    loaded = load(write_gguf(tmp_path / "tiny.gguf", config, tensors, dtype=dtype), tmp_path / "store")
    assert {info.dtype for info in loaded.checkpoint.tensors.values()} == {"F32", dtype}
    expected = logits_of_model(model, tokens)
    assert largest_difference(logits_of(loaded, tokens), expected) <= TOLERANCE
    assert largest_difference(before, expected) > 3 * TOLERANCE  # the rounding is visible


def test_q8_0_blocks_go_into_a_q8_store_without_loss(tmp_path):
    model = build_model(Case("", "Llama", SIZES | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                kind = gguf.GGMLQuantizationType.Q8_0
                blocks = gguf.quants.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, kind)))
    config, tensors = published(model)
    path = write_gguf(tmp_path / "tiny.gguf", config, tensors, dtype="Q8_0")
    tokens = random_tokens(config["vocab_size"])
    loaded = load(path, tmp_path / "store", F32)
    assert largest_difference(logits_of(loaded, tokens), logits_of_model(model, tokens)) <= TOLERANCE
    packed = load(path, tmp_path / "packed", RowFormat("q8", 32))
    query, exact = packed.weights.layers[0].q_proj.weight, loaded.weights.layers[0].q_proj.weight
    assert torch.equal(
        dequantize_rows(query.rows, 64, query.row_format), dequantize_rows(exact.rows, 64, exact.row_format)
    )


def powerinfer_file(tmp_path, *, arch="llama", ranks=RANKS, shift=0.4, seed=1, dtype="F32", **extra):
    tensors = dense_tensors(ranks, shift=shift, seed=seed)
    if dtype == "F16":
        tensors = {name: tensor.half() if tensor.dim() > 1 else tensor for name, tensor in tensors.items()}
    config = SPARSE_LLAMA | {"rope_theta": 10000.0} if arch == "llama" else TURBOSPARSE_MISTRAL
    path = write_gguf(
        tmp_path / "tiny.powerinfer.gguf", config, tensors, arch=arch, dtype=dtype, powerinfer=True, extra=extra
    )
    assert path.read_bytes()[:4] == b"PWRI"
    return path, tensors


@pytest.mark.parametrize("dtype", ["F32", "F16"])
@pytest.mark.parametrize("arch", ["llama", "bamboo"])
def test_a_powerinfer_file_computes_relu_and_masks_where_asked(tmp_path, arch, dtype):
    path, tensors = powerinfer_file(tmp_path, arch=arch, dtype=dtype)
    loaded = load(path, tmp_path / "store")
    tokens, tally = random_tokens(VOCAB, seed=8), Tally()
    act, other = (relu_glu, drelu) if arch == "llama" else (drelu, relu_glu)

    def expected(ffn):
        return Oracle(tensors, ffn, HEADS, KV_HEADS).logits(tokens)

    exact, masked = expected(dense_ffn(tensors, act)), expected(dense_ffn(tensors, act, tally, at_threshold=True))
    assert 0.3 <= tally.masked_share <= 0.9
    assert tally.margin > SAFE_MARGIN
    for mode in (None, "gate", "off"):  # there the predictor only saves work, so it is not used unasked
        assert largest_difference(logits_of(loaded, tokens, mode=mode), exact) <= TOLERANCE
    assert largest_difference(logits_of(loaded, tokens, mode="mask"), masked) <= TOLERANCE
    assert largest_difference(masked, exact) > TELLING
    assert largest_difference(expected(dense_ffn(tensors, other)), exact) > TELLING
    swapped = expected(dense_ffn(tensors, act, Tally(), predictor_input="post_norm"))
    assert largest_difference(swapped, masked) > TELLING


def test_a_powerinfer_files_own_threshold_counts(tmp_path):
    path, tensors = powerinfer_file(tmp_path, shift=0.0, **{"powerinfer.sparse_threshold": 0.375})
    loaded = load(path, tmp_path / "store")
    tokens, tally, other = random_tokens(VOCAB), Tally(), Tally()
    ffn = dense_ffn(tensors, relu_glu, tally, threshold=0.375, at_threshold=True)
    expected = Oracle(tensors, ffn, HEADS, KV_HEADS).logits(tokens)
    assert tally.margin > SAFE_MARGIN
    assert largest_difference(logits_of(loaded, tokens, mode="mask"), expected) <= TOLERANCE
    at_zero = Oracle(tensors, dense_ffn(tensors, relu_glu, other), HEADS, KV_HEADS).logits(tokens)
    assert largest_difference(at_zero, expected) > TELLING


def test_a_powerinfer_file_without_a_predictor_is_relu(tmp_path):
    path, tensors = powerinfer_file(tmp_path, ranks=())
    loaded = load(path, tmp_path / "store")
    tokens = random_tokens(VOCAB)
    expected = Oracle(tensors, dense_ffn(tensors, relu_glu), HEADS, KV_HEADS).logits(tokens)
    assert largest_difference(logits_of(loaded, tokens), expected) <= TOLERANCE


FAULTS = {
    "vocab": ({"also": {"output.weight": np.zeros((VOCAB + 1, 36), np.float32)}}, CheckpointError, "output.weight"),
    "partial-rotation": ({"extra": {"rope.dimension_count": 4}}, UnsupportedModel, "rope.dimension_count 4"),
    "scaling-type": ({"extra": {"rope.scaling.type": "longrope"}}, UnsupportedModel, "rope.scaling.type 'longrope'"),
    "scaling-key": ({"extra": {"rope.scaling.yarn_ext_factor": 0.5}}, UnsupportedModel, "rope.scaling.yarn_ext_factor"),
    "theta-0": ({"extra": {"rope.freq_base": 0.0}}, CheckpointError, "rope_theta is 0.0"),
    "no-heads": ({"extra": {"attention.head_count": 0}}, CheckpointError, "num_attention_heads is 0"),
    "heads": ({"extra": {"attention.head_count_kv": 5}}, CheckpointError, "num_key_value_heads 5"),
    "experts": ({"extra": {"expert_count": 3, "expert_used_count": 4}}, CheckpointError, "num_experts_per_tok 4"),
    "unknown-tensor": (
        {"also": {"blk.0.ffn_up.bias": np.zeros(INTER, np.float32)}},
        CheckpointError,
        "blk.0.ffn_up.bias",
    ),
    "both-downs": (
        {"also": {"blk.0.ffn_down_t.weight": np.zeros((INTER, 36), np.float32)}},
        CheckpointError,
        "blk.0.ffn_down_t.weight are both layers.0.mlp.down_proj",
    ),
    "stray-layer": ({"also": {"blk.3.attn_norm.weight": np.ones(36, np.float32)}}, CheckpointError, "layers.3"),
    "flat-experts": (
        {"also": {"blk.0.ffn_up_exps.weight": np.ones((3, 36), np.float32)}},
        CheckpointError,
        "ffn_up_exps",
    ),
    "few-factors": (
        {"also": {"rope_freqs.weight": np.ones(2, np.float32)}},
        CheckpointError,
        "rope_freqs.weight has 2",
    ),
    "factors-and-scaling": (
        {
            "also": {"rope_freqs.weight": np.ones(3, np.float32)},
            "extra": {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
        },
        UnsupportedModel,
        "rope scaling linear together with rope_freqs.weight",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_contradictory_gguf_file_is_refused_by_name(tmp_path, name):
    options, error, part = FAULTS[name]
    tensors = dense_tensors()
    also = options.get("also", {})
    if "output.weight" in also:
        del tensors["lm_head.weight"]
    path = write_gguf(tmp_path / "tiny.gguf", SPARSE_LLAMA | {"rope_theta": 1e4}, tensors, **options)
    with pytest.raises(error) as caught:
        load(path, tmp_path / "store")
    assert str(caught.value).startswith(str(path))
    assert part in str(caught.value)


def test_an_architecture_that_is_not_known_is_refused(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", SPARSE_LLAMA | {"rope_theta": 1e4}, dense_tensors(), arch="falcon")
    with pytest.raises(UnsupportedModel, match=r"general\.architecture 'falcon' is not supported"):
        load(path, tmp_path / "store")
