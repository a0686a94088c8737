"""The sparse families that transformers does not have: our logits are those of a short independent oracle."""

from __future__ import annotations

import pytest
import torch

from hybrid_runtime.errors import UnsupportedModel, UsageError

from .oracles import (
    SAFE_MARGIN,
    Oracle,
    Tally,
    dense_ffn,
    drelu,
    relu_glu,
    smallthinker_ffn,
    turbosparse_mixtral_ffn,
)
from .published_models import (
    EXPERTS,
    HEADS,
    KV_HEADS,
    RANKS,
    SMALLTHINKER,
    SPARSE_LLAMA,
    SPARSE_QWEN2,
    TOP_K,
    TURBOSPARSE_MISTRAL,
    TURBOSPARSE_MIXTRAL,
    VOCAB,
    dense_tensors,
    smallthinker_tensors,
    turbosparse_mixtral_tensors,
)
from .tiny_models import (
    TELLING,
    TOLERANCE,
    difference,
    largest_difference,
    load,
    logits_of,
    random_tokens,
    write_folder,
)

TOKENS = random_tokens(VOCAB)
SEED = 5  # no decision of its predictors lies within rounding of its threshold
SHIFTS = (0.0, 0.25, 0.8)  # of the predictors' logits: about half, two thirds and nearly nine tenths masked


def saved(tmp_path, config, tensors, **options):
    return load(write_folder(tmp_path / "published", config, tensors), tmp_path / "store", **options)


def oracle(tensors, ffn, **options):
    return Oracle(tensors, ffn, HEADS, KV_HEADS, **options).logits(TOKENS)


def assert_all_equal(loaded, expected, modes):
    assert expected.std() > 0.3  # else equality within the tolerance would say little
    for mode in modes:
        assert difference(loaded, TOKENS, expected, mode=mode) <= TOLERANCE, mode
        assert difference(loaded, TOKENS, expected, mode=mode, chunk=7, num_steps=1) <= TOLERANCE, mode


def assert_really_masks(tally):
    assert 0.3 <= tally.masked_share <= 0.9
    assert tally.margin > SAFE_MARGIN


@pytest.mark.parametrize("window", [5, 4096])
def test_bamboo_without_a_predictor_is_drelu(tmp_path, window):
    config, tensors = TURBOSPARSE_MISTRAL | {"sliding_window": window}, dense_tensors()
    loaded = saved(tmp_path, config, tensors)
    assert loaded.config.predictor_input is None
    expected = oracle(tensors, dense_ffn(tensors, drelu), windows=(window,) * 3)
    assert_all_equal(loaded, expected, (None, "gate", "off"))
    assert largest_difference(oracle(tensors, dense_ffn(tensors, relu_glu), windows=(window,) * 3), expected) > TELLING
    with pytest.raises(UsageError, match="--predictor mask: this checkpoint carries no predictor"):
        logits_of(loaded, TOKENS, mode="mask")


@pytest.mark.parametrize("shift", SHIFTS)
def test_turbosparse_mistral_masks_by_the_residual_before_the_norm(tmp_path, shift):
    tensors = dense_tensors(RANKS, shift=shift, seed=SEED)
    loaded = saved(tmp_path, TURBOSPARSE_MISTRAL, tensors)
    masked, other = Tally(), Tally()
    expected = oracle(tensors, dense_ffn(tensors, drelu, masked))
    assert_really_masks(masked)
    assert_all_equal(loaded, expected, (None, "mask"))
    unmasked = oracle(tensors, dense_ffn(tensors, drelu))
    assert_all_equal(loaded, unmasked, ("off", "gate"))
    swapped = oracle(tensors, dense_ffn(tensors, drelu, other, predictor_input="post_norm"))
    assert largest_difference(swapped, expected) > TELLING
    assert largest_difference(unmasked, expected) > TELLING


@pytest.mark.parametrize("shift", SHIFTS)
def test_turbosparse_mixtral_masks_each_expert_by_the_normed_input(tmp_path, shift):
    tensors = turbosparse_mixtral_tensors(shift=shift, seed=SEED)
    loaded = saved(tmp_path, TURBOSPARSE_MIXTRAL, tensors)
    masked, other = Tally(), Tally()

    def expected_with(tally, **options):
        return oracle(tensors, turbosparse_mixtral_ffn(tensors, EXPERTS, TOP_K, tally, **options), theta=1e6)

    expected = expected_with(masked)
    assert_really_masks(masked)
    assert_all_equal(loaded, expected, (None, "mask"))
    unmasked = expected_with(None)
    assert_all_equal(loaded, unmasked, ("off", "gate"))
    assert largest_difference(expected_with(other, predictor_input="pre_norm"), expected) > TELLING
    assert largest_difference(unmasked, expected) > TELLING


def test_a_predictor_that_masks_nothing_and_one_that_masks_all(tmp_path):
    tensors, tally = dense_tensors((33, 31, 64), shift=-50.0), Tally()
    loaded = saved(tmp_path / "nothing", TURBOSPARSE_MISTRAL, tensors)
    assert_all_equal(loaded, oracle(tensors, dense_ffn(tensors, drelu, tally)), ("mask", "off"))
    assert tally.masked_share == 0
    tensors = dense_tensors((33, 31, 64), shift=50.0)
    loaded = saved(tmp_path / "all", TURBOSPARSE_MISTRAL, tensors)
    assert_all_equal(loaded, oracle(tensors, lambda *_: 0.0), ("mask",))


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.3, 1.2])
def test_prosparse_keeps_gates_above_its_threshold_unchanged(tmp_path, threshold):
    tensors = dense_tensors()
    loaded = saved(tmp_path, SPARSE_LLAMA | {"hidden_act_param": threshold}, tensors)
    tally = Tally()

    def fatrelu(gate, up):
        return gate * tally.decide(gate, threshold) * up

    expected = oracle(tensors, dense_ffn(tensors, fatrelu))
    assert tally.margin > SAFE_MARGIN
    assert_all_equal(loaded, expected, (None, "gate", "off"))
    relu = oracle(tensors, dense_ffn(tensors, relu_glu))
    subtracted = oracle(tensors, dense_ffn(tensors, lambda gate, up: (gate - threshold).clamp(min=0) * up))
    if threshold:
        assert largest_difference(relu, expected) > 10 * TOLERANCE
        assert largest_difference(subtracted, expected) > TELLING


def test_fatrelu_by_override_takes_its_threshold_from_the_flag(tmp_path):
    tensors = dense_tensors()
    loaded = saved(tmp_path, SPARSE_LLAMA, tensors, ffn_activation="fatrelu:0.3")
    expected = oracle(tensors, dense_ffn(tensors, lambda gate, up: gate * (gate > 0.3) * up))
    assert_all_equal(loaded, expected, ("gate", "off"))


@pytest.mark.parametrize("hidden_act", ["silu", "relu"])
def test_sakanas_sparse_llama_is_relu_whatever_its_config_says(tmp_path, hidden_act):
    tensors = dense_tensors()
    del tensors["lm_head.weight"]
    config = SPARSE_LLAMA | {
        "model_type": "llama_sparse_relu",
        "hidden_act": hidden_act,
        "tie_word_embeddings": True,
        "rope_theta": 100000.0,
    }
    loaded = saved(tmp_path, config, tensors)
    assert_all_equal(loaded, oracle(tensors, dense_ffn(tensors, relu_glu), theta=1e5), (None, "gate", "off"))
    silu = oracle(tensors, dense_ffn(tensors, lambda gate, up: torch.nn.functional.silu(gate) * up), theta=1e5)
    assert largest_difference(silu, logits_of(loaded, TOKENS)) > TELLING


@pytest.mark.parametrize(
    "options",
    [
        {"repo_id": "PowerInfer/SparseQwen2-7B"},
        {"repo_id": "Tiiny/SparseQwen2-7B"},
        {"ffn_activation": "drelu"},
        {"repo_id": "PowerInfer/SparseQwen2-7B", "ffn_activation": "relu_glu"},
    ],
    ids=["old-owner", "new-owner", "override", "override-of-repo"],
)
def test_sparse_qwen2_is_drelu_by_its_repository_or_by_the_flag(tmp_path, options):
    tensors = dense_tensors(qkv_bias=True)
    loaded = saved(tmp_path, SPARSE_QWEN2, tensors, **options)
    act, other = (relu_glu, drelu) if options.get("ffn_activation") == "relu_glu" else (drelu, relu_glu)
    expected = oracle(tensors, dense_ffn(tensors, act))
    assert_all_equal(loaded, expected, (None, "gate", "off"))
    assert largest_difference(oracle(tensors, dense_ffn(tensors, other)), expected) > TELLING


def test_sparse_qwen2_is_recognised_by_its_folder(tmp_path):
    folder = write_folder(tmp_path / "SparseQwen2-7B", SPARSE_QWEN2, dense_tensors(qkv_bias=True))
    assert load(folder, tmp_path / "store").config.activation.kind == "drelu"


def test_relu_qwen2_of_unknown_origin_is_refused_with_the_flag_that_decides(tmp_path):
    with pytest.raises(UnsupportedModel) as caught:
        saved(tmp_path, SPARSE_QWEN2, dense_tensors(qkv_bias=True))
    for part in ("config.json", "hidden_act 'relu'", "drelu (SparseQwen2) or relu_glu", "--ffn-activation"):
        assert part in str(caught.value)


SMALLTHINKERS = {
    "sigmoid": {},
    "softmax": {"moe_primary_router_apply_softmax": True},
    "sigmoid-not-normalized": {"norm_topk_prob": False},
    "untied": {"tie_word_embeddings": False},
    "all-rotate-none-slide": {"rope_layout": [1, 1, 1], "sliding_window_layout": [0, 0, 0]},
    "no-positions-all-slide": {"rope_layout": [0, 0, 0], "sliding_window_layout": [1, 1, 1]},
    "top-1": {"moe_num_active_primary_experts": 1},
    "top-all": {"moe_num_active_primary_experts": EXPERTS},
}


@pytest.mark.parametrize("settings", SMALLTHINKERS.values(), ids=SMALLTHINKERS.keys())
def test_smallthinker_routes_by_the_layers_raw_input(tmp_path, settings):
    config = SMALLTHINKER | settings
    tensors = smallthinker_tensors(tied=config["tie_word_embeddings"])
    loaded = saved(tmp_path, config, tensors)
    expected = smallthinker_logits(config, tensors)
    assert_all_equal(loaded, expected, (None, "gate", "off"))
    if config["moe_num_active_primary_experts"] < EXPERTS:
        for router_input in ("pre_norm", "post_norm"):
            assert largest_difference(smallthinker_logits(config, tensors, router_input), expected) > TELLING


@pytest.mark.parametrize(
    "key", ["moe_primary_router_apply_softmax", "norm_topk_prob", "rope_layout", "sliding_window_layout"]
)
def test_the_comparison_sees_a_smallthinker_key_that_is_ignored(key):
    tensors = smallthinker_tensors()
    other = [1 - flag for flag in SMALLTHINKER[key]] if "layout" in key else not SMALLTHINKER[key]
    found, expected = (smallthinker_logits(config, tensors) for config in (SMALLTHINKER | {key: other}, SMALLTHINKER))
    assert largest_difference(found, expected) > TELLING


def smallthinker_logits(config, tensors, router_input="layer_input"):
    ffn = smallthinker_ffn(
        tensors,
        config["moe_num_active_primary_experts"],
        softmax=config["moe_primary_router_apply_softmax"],
        normalize=config["norm_topk_prob"],
        router_input=router_input,
    )
    windows = tuple(config["sliding_window_size"] if slides else None for slides in config["sliding_window_layout"])
    rotates = tuple(bool(flag) for flag in config["rope_layout"])
    return Oracle(tensors, ffn, 4, KV_HEADS, theta=1.5e6, windows=windows, rotates=rotates).logits(TOKENS)
