"""What takes memory beside neurons: counted once, and given VRAM in the order that parts.py promises."""

from dataclasses import replace

import pytest

from hybrid_kernels.activation import Activation
from hybrid_runtime.model.kv_cache import kv_cache_bytes
from hybrid_runtime.placement.parts import (
    GPU_OVERHEAD_BYTES,
    Part,
    PlacedPart,
    bytes_on,
    layers_on_gpu,
    model_parts,
    place_parts,
)

from .made_up import Q4, config_of, manifest_of, mixture_of

NUM_POSITIONS = 50
TWELVE = config_of(num_hidden_layers=12)
MODELS = {
    "dense": config_of(),
    "tied": config_of(tie_word_embeddings=True),
    "mixture": mixture_of(),
    "mixture-predictors": mixture_of(predictor_input="post_norm"),
    "dense-predictors": config_of(predictor_input="post_norm"),
    "biases": config_of(mlp_bias=True, qkv_bias=True, output_bias=True, norm="layer"),
    "opt": config_of(activation=Activation("relu"), rope=None, learned_position_offset=2, tie_word_embeddings=True),
    "12-layers": TWELVE,
}


def parts_of(config, predictor_bytes=None):
    return model_parts(manifest_of(config), NUM_POSITIONS, "f16", predictor_bytes)


def kinds(parts):
    return [(part.kind, part.layer_idx) for part in parts]


@pytest.mark.parametrize("name", MODELS)
def test_every_byte_but_the_bundles_counts_once(name):
    config = MODELS[name]
    parts = parts_of(config)
    entries = [entry for part in manifest_of(config).parts for entry in part.entries]
    rest = sum(entry.num_bytes for entry in entries if entry.kind != "bundles")
    cache = kv_cache_bytes(config, NUM_POSITIONS, "f16")
    assert sum(part.num_bytes for part in parts) == rest + cache
    assert sum(part.num_bytes for part in parts if part.kind == "KV cache") == cache
    assert len(set(kinds(parts))) == len(parts)
    predictors = [part for part in parts if part.kind == "predictors"]
    assert sum(part.num_bytes for part in predictors) == sum(
        entry.num_bytes for entry in entries if ".predictor." in entry.name
    )


def test_layers_first_then_the_head_then_the_embedding():
    parts = parts_of(replace(TWELVE, predictor_input="post_norm"))
    layers = [(kind, idx) for idx in range(12) for kind in ("attention", "KV cache", "predictors")]
    assert kinds(parts) == [*layers, ("head", None), ("embedding", None)]
    for each in ("attention", "KV cache", "predictors"):  # layer 1 has not what layers 10 and 11 have
        assert len({part.num_bytes for part in parts if part.kind == each}) == 1


def test_predictors_beside_the_store_are_those_that_count():
    sizes = [100, 0, 300]
    for config in (MODELS["dense"], MODELS["dense-predictors"]):
        found = {part.layer_idx: part.num_bytes for part in parts_of(config, sizes) if part.kind == "predictors"}
        assert found == {0: 100, 2: 300}


def test_a_tied_embedding_is_the_head():
    row = replace(Q4, kind="q8").row_bytes(64)
    untied, tied = ({part.kind: part for part in parts_of(MODELS[name])} for name in ("dense", "tied"))
    norm = 64 * 4
    assert untied["embedding"].num_bytes == 256 * row
    assert untied["head"].num_bytes == tied["head"].num_bytes == 256 * row + norm
    assert "embedding" not in tied
    learned = {part.kind: part for part in parts_of(MODELS["opt"])}
    assert learned["embedding"].num_bytes == (256 + 2) * row  # of positions, of which a token reads one as well


def test_vram_is_filled_in_order_and_nothing_overtakes():
    """A layer's attention, cache and predictors are one thing: 12 of these, and the head."""
    parts = parts_of(replace(TWELVE, predictor_input="post_norm"))
    wanted = [part for part in parts if part.kind != "embedding"]
    for count in (*range(0, 37, 3), 37):
        needed = GPU_OVERHEAD_BYTES + sum(part.num_bytes for part in wanted[:count])
        for spare in (0, 1):
            placed, left = place_parts(parts, needed + spare)
            assert [each.part for each in placed] == parts
            assert [each.device for each in placed] == ["gpu"] * count + ["ram"] * (len(parts) - count)
            assert left == spare, "which neurons get"
            assert layers_on_gpu(placed) == set(range(min(count // 3, 12)))
            assert bytes_on(placed, "gpu") == needed - GPU_OVERHEAD_BYTES
            assert bytes_on(placed, "gpu") + bytes_on(placed, "ram") == sum(part.num_bytes for part in parts)


def test_a_small_part_does_not_overtake_a_large_one():
    parts = [
        Part("attention", 0, 10),
        Part("KV cache", 0, 10),
        Part("attention", 1, 10),
        Part("KV cache", 1, 50),
        Part("head", None, 5),
        Part("embedding", None, 5),
    ]
    placed, left = place_parts(parts, GPU_OVERHEAD_BYTES + 69)
    assert [each.device for each in placed] == ["gpu", "gpu", "ram", "ram", "ram", "ram"]
    assert left == 69 - 20


def test_only_the_kinds_that_are_asked_for_go_to_the_gpu():
    parts = parts_of(MODELS["dense-predictors"])
    placed, left = place_parts(parts, 8 << 30, ["head"])
    assert {each.part.kind for each in placed if each.device == "gpu"} == {"head"}
    assert left == (8 << 30) - GPU_OVERHEAD_BYTES - bytes_on(placed, "gpu")
    assert place_parts(parts, 8 << 30, ())[1] == (8 << 30) - GPU_OVERHEAD_BYTES


@pytest.mark.parametrize("vram_bytes", [0, 1, GPU_OVERHEAD_BYTES - 1, GPU_OVERHEAD_BYTES])
def test_without_vram_everything_is_in_ram(vram_bytes):
    parts = parts_of(MODELS["dense"])
    assert place_parts(parts, vram_bytes) == ([PlacedPart(part, "ram") for part in parts], 0)
