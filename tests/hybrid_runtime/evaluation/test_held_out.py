"""Held-out losses are cross entropies of whole windows, and judged sets are those that fire."""

import math

import pytest
import torch

from hybrid_predictors.study import OraclePredictor, RandomPredictor
from hybrid_runtime.engine import open_model
from hybrid_runtime.evaluation import held_out
from hybrid_runtime.evaluation.held_out import Losses, judged, window_losses
from hybrid_runtime.load_options import LoadOptions
from hybrid_runtime.model.kv_cache import KvCache
from hybrid_runtime.stores import ModelRequest
from hybrid_tools.convert import main as convert

from ..small_models import LLAMA, NUM_TOKENS, write_model  # noqa: TID252  # absolute names are the runtime's

DENSE = LLAMA | {"architectures": ["BambooForCausalLM"], "model_type": "bamboo", "hidden_act": "relu"}
WINDOWS = torch.randint(4, NUM_TOKENS, (3, 40), generator=torch.Generator().manual_seed(0)).int()


@pytest.fixture(scope="module")
def sequence(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    write_model(folder / "checkpoint", DENSE)
    assert convert([str(folder / "checkpoint"), "-o", str(folder / "store")]) == 0
    opened = open_model(ModelRequest(str(folder / "store")), LoadOptions(num_positions=64, threads=1))
    return opened.load_sequence()


def test_losses_are_those_of_every_token_but_each_windows_first(sequence):
    found = window_losses(sequence, WINDOWS)
    assert found.losses.shape == (3, 39)
    assert found.losses.dtype == torch.float64
    for window, losses in zip(WINDOWS.long(), found.losses, strict=True):
        logits = sequence.decoder.forward(window, KvCache(sequence.decoder.config, 64, "f32"), all_logits=True)
        expected = -logits.log_softmax(1)[torch.arange(39), window[1:]]
        torch.testing.assert_close(losses.float(), expected, atol=1e-4, rtol=1e-4)
    assert found.perplexity == pytest.approx(math.exp(found.losses.mean()))


def test_windows_of_several_batches_lose_no_token_between_them(sequence, monkeypatch):
    at_once = window_losses(sequence, WINDOWS)
    monkeypatch.setattr(held_out, "PREFILL_BATCH", 13)
    torch.testing.assert_close(window_losses(sequence, WINDOWS).losses, at_once.losses, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(held_out, "PREFILL_BATCH", 40)  # the last batch ends where the window does
    assert window_losses(sequence, WINDOWS).losses.shape == at_once.losses.shape


def test_an_increase_is_of_pairs():
    exact = Losses(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64))
    worse = Losses(exact.losses + 0.1)
    increase, error = worse.increase_over(exact)
    assert increase == pytest.approx(math.expm1(0.1))
    assert error == pytest.approx(0.0, abs=1e-12)  # each token lost the same, however unlike the tokens are
    assert math.isnan(Losses(exact.losses[:, :1]).increase_over(Losses(exact.losses[:, :1]))[1])


def test_the_oracle_is_judged_to_be_one(sequence):
    layers = sequence.decoder.weights.layers
    activation = sequence.decoder.config.activation
    oracles = [[OraclePredictor(ffn.bundles, activation) for ffn in layer.experts] for layer in layers]
    qualities, losses = judged(sequence, WINDOWS, oracles)
    assert [quality.recall for quality in qualities] == [quality.precision for quality in qualities] == [1.0, 1.0]
    assert torch.equal(losses.losses, window_losses(sequence, WINDOWS).losses)
    again, same = judged(sequence, WINDOWS, oracles, losses)  # known before: no logits
    assert again == qualities
    assert same is losses
    blind = [[RandomPredictor(48, 0, threshold=0.75)] for _ in layers]
    qualities, _ = judged(sequence, WINDOWS, blind)
    assert all(0.15 < quality.recall < 0.35 for quality in qualities)
    assert all(quality.predicted_density == pytest.approx(0.25, abs=0.05) for quality in qualities)
