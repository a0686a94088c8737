"""Counts of small models, of every kind of network and row format, against counts made token by token.

What each network got is recorded; its neurons' values are computed again, and counted in plain loops.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
import torch

from hybrid_kernels.activation import activate
from hybrid_kernels.linear.op import linear
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.sparse_ffn import batch
from hybrid_predictors.mlp import MlpPredictor
from hybrid_runtime.model.decoder import Decoder, choose_predictor_mode
from hybrid_runtime.model.kv_cache import KvCache
from hybrid_runtime.profiling.counting import FiringCounter
from hybrid_runtime.profiling.profile import LAYER_FIELDS, empty_layers
from tests.hybrid_runtime.model.tiny_models import load
from tests.hybrid_runtime.small_models import LLAMA, NUM_TOKENS, TURBOSPARSE, write_model

from .conftest import DENSE

FORMATS = {"f32": RowFormat("f32"), "bf16": RowFormat("bf16"), "q8": RowFormat("q8", 32)}
BATCHES = (1, 40, 7)  # tokens; a token alone, too
MODELS = {
    "dense": (DENSE, "off"),
    "silu": (LLAMA, "off"),
    "mixture": (TURBOSPARSE, "off"),
    "mask": (TURBOSPARSE, "mask"),
}


@pytest.fixture(scope="module", params=[(name, kind) for name in MODELS for kind in FORMATS], ids="-".join)
def decoder(request, tmp_path_factory):
    name, kind = request.param
    config, mode = MODELS[name]
    folder = tmp_path_factory.mktemp(f"{name}-{kind}")
    loaded = load(write_model(folder / "checkpoint", config), folder / "store", FORMATS[kind])
    return Decoder(loaded.config, loaded.weights, choose_predictor_mode(loaded.config, mode))


class Watched:
    """A decoder's batches, counted by the counter under test; and everything that its networks got meanwhile."""

    def __init__(self, decoder, monkeypatch, watched):
        self.config = decoder.config
        self.watched = watched
        self.layers = empty_layers(decoder.config, len(watched))
        self.passes = []  # batch, layer, expert, tokens, bool [n, I]
        self.shown = []  # the same as the counter shows it, without the batch
        self.batch_idx = 0
        feed_forward = Decoder._feed_forward

        def recording(decoder, layer_idx, expert_idx, tokens, x, predictor_input, observer):
            which = list(range(len(x))) if tokens is None else tokens.tolist()
            fires = fires_of(decoder, layer_idx, expert_idx, x, predictor_input)
            self.passes.append((self.batch_idx, layer_idx, expert_idx, which, fires))
            return feed_forward(decoder, layer_idx, expert_idx, tokens, x, predictor_input, observer)

        monkeypatch.setattr(Decoder, "_feed_forward", recording)
        counter = FiringCounter(decoder.config, self.layers, torch.tensor(watched), self.show)
        cache = KvCache(decoder.config, sum(BATCHES), "f32")
        generator = torch.Generator().manual_seed(11)
        for self.batch_idx, size in enumerate(BATCHES):
            decoder.forward(torch.randint(NUM_TOKENS, (size,), generator=generator), cache, observer=counter)
            counter.finish()

    def show(self, ffn, active):
        tokens = list(range(len(active))) if ffn.tokens is None else ffn.tokens.tolist()
        assert len(ffn.predictor_input) == len(tokens)
        self.shown.append((ffn.layer_idx, ffn.expert_idx, tokens, active.tolist()))

    def recount(self):
        """What `layers` should hold, as nested lists."""
        counts = [defaultdict(Counter) for _ in self.layers]
        experts = [defaultdict(list) for _ in self.layers]  # of each token of each batch
        for batch_idx, layer_idx, expert_idx, tokens, fires in self.passes:
            for token, row in zip(tokens, fires.tolist(), strict=True):
                fired = {neuron for neuron, fires in enumerate(row) if fires}
                layer = counts[layer_idx]
                layer["fired"].update((expert_idx, neuron) for neuron in fired)
                layer["tokens"][expert_idx] += 1
                layer["active_squares"][expert_idx] += len(fired) ** 2
                pairs = [(i, j) for i, first in enumerate(self.watched) for j, second in enumerate(self.watched)
                         if {first, second} <= fired]  # fmt: skip
                layer["co_fired"].update((expert_idx, *pair) for pair in pairs)
                experts[layer_idx][batch_idx, token].append(expert_idx)
        if self.config.num_experts:
            for layer_idx in range(len(experts) - 1):
                for token, before in experts[layer_idx].items():
                    after = experts[layer_idx + 1][token]
                    counts[layer_idx]["follows"].update((i, j) for i in before for j in after)
        return counts

    def require_equal(self):
        for counts, layer in zip(self.recount(), self.layers, strict=True):
            for name in LAYER_FIELDS:
                tensor = getattr(layer, name)
                found = {
                    tuple(place) if len(place) > 1 else place[0]: int(tensor[tuple(place)])
                    for place in tensor.nonzero().tolist()
                }
                assert found == {place: count for place, count in counts[name].items() if count}, name


def fires_of(decoder, layer_idx, expert_idx, x, predictor_input):
    """bool [n, I]: values that are not zero."""
    ffn = decoder.weights.layers[layer_idx].experts[expert_idx]
    bundles, team = ffn.bundles, decoder.team
    gate = linear(x, bundles.gate_proj, bundles.gate_bias, team=team)
    values = activate(decoder.config.activation, gate, linear(x, bundles.up_proj, bundles.up_bias, team=team))
    return (values != 0) & ffn.predictor.active(predictor_input, team) if decoder.masks else values != 0


def test_counts_equal_a_recount_token_by_token(decoder, monkeypatch):
    watched = Watched(decoder, monkeypatch, list(range(0, 48, 5)))
    watched.require_equal()
    slots = decoder.config.num_experts_per_tok or 1
    assert all(int(layer.tokens.sum()) == sum(BATCHES) * slots for layer in watched.layers)
    assert any(int(layer.fired.sum()) for layer in watched.layers)


def test_each_network_s_active_sets_are_shown_once(decoder, monkeypatch):
    watched = Watched(decoder, monkeypatch, [0])
    assert watched.shown == [
        (layer_idx, expert_idx, tokens, fires.tolist()) for _, layer_idx, expert_idx, tokens, fires in watched.passes
    ]


def test_neurons_in_blocks_count_as_at_once(decoder, monkeypatch):
    monkeypatch.setattr(batch, "BLOCK_WEIGHTS", 32 * 5)  # five neurons a block
    monkeypatch.setattr(batch, "WORTHWHILE_SHARE", 2.0)  # and those alone that a token needs
    Watched(decoder, monkeypatch, list(range(48))).require_equal()


@pytest.mark.parametrize("decoder", [("mask", kind) for kind in FORMATS], ids="-".join, indirect=True)
def test_tokens_for_which_a_predictor_lets_nothing_through_are_counted(decoder, monkeypatch):
    """In a whole pass, too: then no neuron is computed."""
    active, silent = MlpPredictor.active, decoder.weights.layers[0].experts[1].predictor

    def none_of_expert_1(predictor, x, team):
        return active(predictor, x, team) & (predictor is not silent)

    monkeypatch.setattr(MlpPredictor, "active", none_of_expert_1)
    watched = Watched(decoder, monkeypatch, [0, 1, 47])
    watched.require_equal()
    layer = watched.layers[0]
    assert layer.tokens[1] > 0
    assert layer.fired[1].sum() == 0
    assert any(layer_idx == 0 and expert_idx == 1 for layer_idx, expert_idx, *_ in watched.shown)


def test_what_one_batch_left_is_not_the_next_one_s(decoder, monkeypatch):
    """Experts follow each other within a token, not from the last layer of a batch to the first of the next."""
    watched = Watched(decoder, monkeypatch, [0])
    if not decoder.config.num_experts:
        assert all(layer.follows.shape == (0, 0) for layer in watched.layers)
        return
    slots = decoder.config.num_experts_per_tok
    *before, last = watched.layers
    assert all(int(layer.follows.sum()) == sum(BATCHES) * slots**2 for layer in before)
    assert last.follows.shape == (0, 0)
