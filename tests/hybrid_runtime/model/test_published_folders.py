"""TurboSparse folders as they are published: bf16, names and keys verbatim, shards that end inside a layer."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from hybrid_kernels.quantization.row_format import RowFormat

from .oracles import SAFE_MARGIN, Oracle, Tally, dense_ffn, drelu, turbosparse_mixtral_ffn
from .published_models import (
    EXPERTS,
    HEADS,
    KV_HEADS,
    RANKS,
    TOP_K,
    TURBOSPARSE_MISTRAL,
    TURBOSPARSE_MIXTRAL,
    VOCAB,
    dense_tensors,
    turbosparse_mixtral_tensors,
)
from .tiny_models import TOLERANCE, difference, largest_difference, load, logits_of, random_tokens, write_folder

TOKENS = random_tokens(VOCAB)
SEED = {"turbosparsemixtral": 3, "bamboo": 3}  # no decision of the predictors lies within rounding of its threshold


def make(kind):
    """config, bf16 tensors by published name, the oracle's FFN and theta, the tally of its masks."""
    tally = Tally()
    if kind == "bamboo":
        tensors = rounded(dense_tensors(RANKS, shift=0.4, seed=SEED[kind]))
        return TURBOSPARSE_MISTRAL, tensors, dense_ffn(tensors, drelu, tally), 1e4, tally
    tensors = rounded(turbosparse_mixtral_tensors(shift=0.4, seed=SEED[kind]))
    return TURBOSPARSE_MIXTRAL, tensors, turbosparse_mixtral_ffn(tensors, EXPERTS, TOP_K, tally), 1e6, tally


def rounded(tensors):
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


@pytest.mark.parametrize("num_shards", [1, 5])
@pytest.mark.parametrize("kind", ["bamboo", "turbosparsemixtral"])
def test_a_published_folder_loads_by_its_path(tmp_path, kind, num_shards):
    config, tensors, ffn, theta, tally = make(kind)
    folder = write_folder(tmp_path / "published", config, tensors, num_shards)
    if num_shards > 1:
        assert layers_are_cut(folder)
    loaded = load(folder, tmp_path / "store")
    assert loaded.config.family == kind
    assert loaded.config.predictor_is_part_of_model
    assert [ranks_of_layer(loaded, idx) for idx in range(3)] == [{rank} for rank in RANKS]
    expected = Oracle(tensors, ffn, HEADS, KV_HEADS, theta=theta).logits(TOKENS)
    assert 0.3 <= tally.masked_share <= 0.9
    assert tally.margin > SAFE_MARGIN
    assert difference(loaded, TOKENS, expected) <= TOLERANCE
    assert difference(loaded, TOKENS, expected, chunk=7, num_steps=1) <= TOLERANCE


def test_the_config_says_what_the_published_one_says(tmp_path):
    config, tensors, *_ = make("turbosparsemixtral")
    loaded = load(write_folder(tmp_path / "published", config, tensors), tmp_path / "store")
    assert loaded.config.activation.kind == "drelu"  # although hidden_act is "relu"
    assert loaded.config.sliding_windows == ()
    assert loaded.config.rope is not None
    assert loaded.config.rope.theta == 1e6
    assert loaded.config.predictor_input == "post_norm"
    assert loaded.config.eos_token_ids == (2,)
    config, tensors, *_ = make("bamboo")
    loaded = load(write_folder(tmp_path / "other", config, tensors), tmp_path / "other-store")
    assert loaded.config.sliding_windows == (4096,) * 3
    assert loaded.config.predictor_input == "pre_norm"


def test_a_bf16_store_of_bf16_weights_keeps_every_bit(tmp_path):
    config, tensors, *_ = make("turbosparsemixtral")
    folder = write_folder(tmp_path / "published", config, tensors)
    exact, half = load(folder, tmp_path / "f32"), load(folder, tmp_path / "bf16", RowFormat("bf16"))
    assert half.store.num_bytes < exact.store.num_bytes
    assert largest_difference(logits_of(half, TOKENS), logits_of(exact, TOKENS)) <= TOLERANCE


def ranks_of_layer(loaded, layer_idx):
    prefix = f"layers.{layer_idx}.mlp"
    return {rank for ffn, rank in loaded.checkpoint.predictor_ranks().items() if ffn.startswith(prefix)}


def layers_are_cut(folder):
    """Whether some expert's or FFN's tensors lie in two shards, as the index says and the shards show."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for file in set(weight_map.values()):
        with safe_open(folder / file, "pt") as shard:
            assert {weight_map[name] for name in shard.keys()} == {file}  # noqa: SIM118  # not a mapping
    files_of_layer = {}
    for name, file in weight_map.items():
        if ".layers." in name:
            files_of_layer.setdefault(name.split(".")[2], set()).add(file)
    return any(len(files) > 1 for files in files_of_layer.values())


def test_layers_are_cut_notices_whole_layers(tmp_path):
    tensors = {f"model.layers.{idx}.a": torch.ones(2) for idx in range(2)}
    assert not layers_are_cut(write_folder(tmp_path / "whole", {}, tensors, 2))
