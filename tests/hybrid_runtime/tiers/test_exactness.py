"""Neurons spread over tiers, results merged anywhere: the same logits as from one memory, and always the same bits."""

from __future__ import annotations

import random

import pytest
import torch

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.model.decoder import Decoder, choose_predictor_mode
from hybrid_runtime.model.kv_cache import KvCache

from ..model import published_models as models  # noqa: TID252
from ..model.test_token_program import MODELS, TOLERANCES  # noqa: TID252
from ..model.tiny_models import load, random_tokens, write_folder  # noqa: TID252
from .tiered_models import spread

FORMATS = [RowFormat("f32"), RowFormat("bf16"), RowFormat("q8", 32), RowFormat("q4", 32)]
TOKENS = random_tokens(models.VOCAB)
BATCHES = (1, 2, 3, 8, 40)
NUM_COMBINATIONS = 30


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Each model in each format, made when first asked for."""
    made = {}

    def find(name, row_format):
        key = (name, str(row_format))
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            config, make = MODELS[name]
            options = {"ffn_activation": "drelu"} if name == "sparse-qwen2" else {}
            original = write_folder(folder / "original", config, make())
            made[key] = load(original, folder / "store", row_format, **options)
        return made[key]

    return find


def combination(seed):
    """Of family, format, batch, number of tokens in the context, type of the cache."""
    chance = random.Random(seed)
    name = list(MODELS)[seed % len(MODELS)]
    row_format = FORMATS[seed // len(MODELS) % len(FORMATS)]
    return name, row_format, chance.choice(BATCHES), chance.randrange(8, len(TOKENS) + 1), chance.choice(("f32", "f16"))


def logits_of(decoder, tokens, batch, dtype):
    """The first tokens as batches of that size, the last third one by one."""
    cache = KvCache(decoder.config, len(tokens), dtype)
    prompt, rest = tokens[: 2 * len(tokens) // 3], tokens[2 * len(tokens) // 3 :]
    parts = [decoder.forward(part, cache, all_logits=True) for part in prompt.split(batch)]
    return torch.cat([*parts, *(decoder.forward(token.view(1), cache) for token in rest)])


@pytest.mark.parametrize("seed", range(NUM_COMBINATIONS))
def test_logits_are_those_of_one_memory_whatever_is_where(loaded, team, seed):
    name, row_format, batch, length, dtype = combination(seed)
    model = loaded(name, row_format)
    mode = choose_predictor_mode(model.config, None)
    tokens = TOKENS[:length]
    expected = logits_of(Decoder(model.config, model.weights, mode, team), tokens, batch, dtype)
    spread_out = Decoder(model.config, spread(model.store, seed), mode, team)
    found = logits_of(spread_out, tokens, batch, dtype)
    allowed = TOLERANCES[row_format.kind] * expected.norm(dim=1)
    assert ((found - expected).norm(dim=1) <= allowed).all()
    assert torch.equal(logits_of(spread_out, tokens, batch, dtype), found), "what the cache holds changes no bit"
    again = Decoder(model.config, spread(model.store, seed, asynchronous=False), mode, team)
    assert torch.equal(logits_of(again, tokens, batch, dtype), found), "how bundles are read changes no bit"


def test_combinations_cover_everything():
    seen = [combination(seed) for seed in range(NUM_COMBINATIONS)]
    assert {each[0] for each in seen} == set(MODELS)
    assert {each[1] for each in seen} == set(FORMATS)
    assert {each[2] for each in seen} == set(BATCHES)
