"""Every family that transformers implements: our logits are its logits, through files, store, prefill and cache."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch

from hybrid_runtime.config import RopeConfig
from hybrid_runtime.errors import UsageError
from hybrid_runtime.model.decoder import Decoder
from hybrid_runtime.model.kv_cache import KvCache

from .tiny_models import (
    F32,
    PROMPT,
    TELLING,
    TOLERANCE,
    Loaded,
    difference,
    largest_difference,
    load,
    logits_of,
    random_tokens,
    without_biases,
)
from .transformers_models import CASES, build_model, logits_of_model


@dataclass(frozen=True, slots=True)
class Pair:
    """One model in both implementations, and what theirs says."""

    loaded: Loaded
    tokens: torch.Tensor
    expected: torch.Tensor

    def difference(self, **options):
        return difference(self.loaded, self.tokens, self.expected, **options)


def make_pair(case, folder):
    model = build_model(case)
    model.save_pretrained(folder / "published", max_shard_size=case.max_shard_size)
    tokens = random_tokens(model.config.vocab_size)
    loaded = load(folder / "published", folder / "store", F32)
    return Pair(loaded, tokens, logits_of_model(model, tokens))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def pair(request, tmp_path_factory):
    return make_pair(request.param, tmp_path_factory.mktemp("model"))


def test_prefill_and_cached_decode_equal_transformers(pair):
    assert pair.expected.std() > 0.3  # else equality within the tolerance would say little
    assert pair.difference(mode="off") <= TOLERANCE


def test_prefill_in_chunks_of_7_equals_transformers(pair):
    assert pair.difference(mode="off", chunk=7, num_steps=3) <= TOLERANCE


def test_stopping_at_gates_that_do_not_fire_changes_nothing(pair):
    prompt = pair.tokens[:PROMPT]
    if not pair.loaded.config.activation.gate_decides:
        with pytest.raises(UsageError, match=r"--predictor gate: .* leaves no exact zeros at its gate"):
            logits_of(pair.loaded, prompt, mode="gate")
        return
    off = logits_of(pair.loaded, prompt, mode="off")
    assert largest_difference(logits_of(pair.loaded, prompt, mode="gate"), off) <= 1e-5
    assert pair.difference(mode="gate", chunk=7) <= TOLERANCE


OLDER = ("llama-theta", "llama-linear", "llama-llama3", "llama-yarn-mscale", "llama-longrope-short", "qwen2-W5-from-1")


@pytest.mark.parametrize("name", OLDER)
def test_a_config_in_the_words_of_transformers_4_is_the_same_model(name, tmp_path):
    """`rope_theta` and `rope_scaling` for `rope_parameters`, `max_window_layers` for `layer_types`."""
    pair = make_pair(named(name), tmp_path)
    path = tmp_path / "published" / "config.json"
    config = json.loads(path.read_text())
    config.pop("layer_types", None)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    path.write_text(json.dumps(config))
    loaded = load(tmp_path / "published", tmp_path / "older")
    assert loaded.config == pair.loaded.config
    assert difference(loaded, pair.tokens, pair.expected, num_steps=0) <= TOLERANCE


def named(name):
    return next(case for case in CASES if case.name == name)


def other_rope(**changes):
    return lambda config: replace(config, rope=replace(config.rope, **changes))


def of_plain_rope(config):
    return replace(config, rope=RopeConfig(config.rope.theta))


# What the comparison would show if a part of the configuration were ignored: far more than the tolerance.
WRONG_CONFIGS = (
    ("llama-theta", other_rope(theta=10000.0)),
    ("llama-linear", of_plain_rope),
    ("llama-llama3", of_plain_rope),
    ("llama-yarn", of_plain_rope),
    ("llama-yarn", other_rope(attention_factor=1.0)),
    ("llama-yarn", other_rope(truncate=False)),
    ("llama-yarn-attention-factor", other_rope(attention_factor=None)),
    ("llama-yarn-mscale", other_rope(mscale=0.0)),
    ("llama-yarn-betas", other_rope(beta_fast=32.0)),
    ("llama-longrope-short", other_rope(original_max_position_embeddings=32)),
    ("llama-longrope-crossed-in-prompt", other_rope(original_max_position_embeddings=64)),
    ("llama-eps", lambda config: replace(config, norm_eps=1e-6)),
    ("mistral-no-window-eps", lambda config: replace(config, norm_eps=1e-6)),
    ("mixtral-eps", lambda config: replace(config, norm_eps=1e-5)),
    ("llama-relu", lambda config: replace(config, activation=replace(config.activation, kind="drelu"))),
    ("mistral-W5", lambda config: replace(config, sliding_windows=(6,) * 3)),
    ("mistral-W17", lambda config: replace(config, sliding_windows=())),
    ("mixtral-E3-k2", lambda config: replace(config, num_experts_per_tok=1)),
    ("mixtral-E3-k2", lambda config: replace(config, normalize_expert_weights=False)),
    ("qwen2-W5-from-1", lambda config: replace(config, sliding_windows=(None, 5, None))),
    ("qwen2-W5-layer-types", lambda config: replace(config, sliding_windows=())),
    ("opt", lambda config: replace(config, learned_position_offset=1)),
)


@pytest.mark.parametrize(
    ("name", "spoil"), WRONG_CONFIGS, ids=[f"{idx}-{name}" for idx, (name, _) in enumerate(WRONG_CONFIGS)]
)
def test_the_comparison_sees_a_config_value_that_is_ignored(name, spoil, tmp_path):
    pair = make_pair(named(name), tmp_path)
    config = spoil(pair.loaded.config)
    assert config != pair.loaded.config
    assert pair.difference(mode="off", config=config, num_steps=0) > TELLING


BIASED = {
    "llama-biases": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj"),
    "opt": ("q_proj", "v_proj", "o_proj"),  # without rotation a key's bias adds the same to all of a query's scores
    "arcee-biases": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


@pytest.mark.parametrize("name", BIASED)
def test_the_comparison_sees_a_bias_that_is_ignored(name, tmp_path):
    pair = make_pair(named(name), tmp_path)
    for projection in BIASED[name]:
        weights = without_biases(pair.loaded.weights, projection)
        assert pair.difference(mode="off", weights=weights, num_steps=0) > TELLING


@pytest.mark.parametrize("bias", ["gate_bias", "up_bias", "down_bias"])
def test_the_comparison_sees_an_ffn_bias_that_is_ignored(bias, tmp_path):
    pair = make_pair(named("llama-biases"), tmp_path)
    layers = tuple(
        replace(layer, experts=(replace(layer.experts[0], bundles=replace(layer.experts[0].bundles, **{bias: None})),))
        for layer in pair.loaded.weights.layers
    )
    assert pair.difference(mode="off", weights=replace(pair.loaded.weights, layers=layers), num_steps=0) > TELLING


def test_a_window_of_transformers_is_ours_with_the_own_token_counted(tmp_path):
    pair = make_pair(named("mistral-W5"), tmp_path)
    first_tokens = logits_of(pair.loaded, pair.tokens, config=replace(pair.loaded.config, sliding_windows=()))[:5]
    assert largest_difference(first_tokens, pair.expected[:5]) <= TOLERANCE  # no token has left the window yet
    assert pair.loaded.config.sliding_windows == (5, 5, 5)


def test_the_last_logits_alone_are_the_last_of_all(tmp_path):
    pair = make_pair(named("llama-relu"), tmp_path)
    decoder = Decoder(pair.loaded.config, pair.loaded.weights, "gate")
    cache = KvCache(pair.loaded.config, PROMPT, "f32")
    logits = decoder.forward(pair.tokens[:PROMPT], cache)
    assert largest_difference(logits, pair.expected[PROMPT - 1 : PROMPT]) <= TOLERANCE
    assert cache.length == PROMPT


def test_a_float16_cache_stays_near(tmp_path):
    """Keys and values rounded to 11 bits: near the float32 logits, and not equal to them."""
    pair = make_pair(named("llama-silu"), tmp_path)
    found = logits_of(pair.loaded, pair.tokens, cache_dtype="f16")
    assert 1e-5 < largest_difference(found, pair.expected) < 0.05
