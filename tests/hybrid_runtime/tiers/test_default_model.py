"""The default model says the same wherever its neurons are."""

from __future__ import annotations

import pytest
import torch

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.model.decoder import Decoder, choose_predictor_mode
from hybrid_runtime.model.kv_cache import KvCache
from hybrid_runtime.model.weights import load_weights
from hybrid_runtime.shipped import DEFAULT_MODEL, SHIPPED_MODELS
from hybrid_runtime.store.convert import Conversion, convert
from hybrid_runtime.store.layout import Quantization
from hybrid_runtime.store.reader import open_store
from hybrid_runtime.store.stored_weights import StoredWeights
from hybrid_runtime.text.load import load_tokenizer

from .tiered_models import ALLOWED, MERGES, spread

PROMPTS = ("Once upon a time", "Tom and Lily went to the park. They saw")
NUM_TOKENS = 32
NUM_RANDOM = 2
NEARLY = 0.1  # logits, whose deviation is 2.8: what rounding activations to int8 changes them by


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """As shipped (q8), and as float32."""
    shipped = open_store(SHIPPED_MODELS[DEFAULT_MODEL])
    folder = tmp_path_factory.mktemp("f32") / "store"
    unpacked = Conversion(StoredWeights(shipped), folder, Quantization(RowFormat("f32")), "f32", lambda _: None)
    return {"q8": shipped, "f32": convert(unpacked)}


@pytest.fixture(scope="module")
def prompts(stores):
    tokenizer = load_tokenizer(stores["q8"].tokenizer_folder)
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


def greedy(decoder, prompt):
    """The text, and the logits that it was drawn from."""
    cache = KvCache(decoder.config, len(prompt) + NUM_TOKENS, "f16")
    seen, answer = [decoder.forward(torch.tensor(prompt), cache)[-1]], []
    for _ in range(NUM_TOKENS):
        answer.append(int(seen[-1].argmax()))
        seen.append(decoder.forward(torch.tensor(answer[-1:]), cache)[-1])
    return answer, torch.stack(seen)


def everything_in(config, merge, tier):
    """Every neuron in one tier."""
    shape, layers = (config.num_experts, config.intermediate_size), config.num_hidden_layers
    return {"points_and_tiers": ([merge] * layers, [torch.full(shape, tier, dtype=torch.uint8) for _ in range(layers)])}


def decoders(store, team):
    """The plain one, then spread ones: all in one tier by each merge point, then at random."""
    config = store.manifest.config
    mode = choose_predictor_mode(config, None)
    yield "plain", Decoder(config, load_weights(store), mode, team)
    for merge in MERGES:
        for tier in ALLOWED[merge]:
            yield merge, Decoder(config, spread(store, 0, **everything_in(config, merge, tier)), mode, team)
    for seed in range(NUM_RANDOM):
        yield "random", Decoder(config, spread(store, seed), mode, team)
        yield "none", Decoder(config, spread(store, seed, merges=("none",)), mode, team)


@pytest.mark.parametrize("name", ["f32", "q8"])
def test_any_permutation_of_tiers_gives_the_same_text(stores, prompts, team, name):
    """In q8 two texts may part where the two likeliest tokens nearly tie: activations are rounded, sums are not exact.

    Between RAM and disk not even a bit differs.
    """
    (_, plain), *others = decoders(stores[name], team)
    for prompt in prompts:
        expected, logits = greedy(plain, prompt)
        for merge, decoder in others:
            found, others_logits = greedy(decoder, prompt)
            if merge == "none":
                assert torch.equal(others_logits, logits)
            elif name == "f32":
                assert found == expected
            elif found != expected:
                first = next(idx for idx in range(NUM_TOKENS) if found[idx] != expected[idx])
                assert logits[first][expected[first]] - logits[first][found[first]] < NEARLY
