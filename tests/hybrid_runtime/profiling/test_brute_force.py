"""Counts of a profile against counts that share nothing with it: made from each network's inputs, number by number.

On the two trained dReLU mixtures. The gate's and the up projection's values are computed again from what each network
got, the counting is numpy's over whole arrays. Against another implementation of the whole model (the oracle, in
float32) only neurons that stand at the edge of firing may differ.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hybrid_kernels.linear.op import linear
from hybrid_kernels.linear.reference import rounded_linear
from hybrid_kernels.team import Team
from hybrid_runtime.budget import PREFILL_BATCH
from hybrid_runtime.engine import open_model
from hybrid_runtime.load_options import LoadOptions
from hybrid_runtime.model.decoder import Decoder
from hybrid_runtime.profiling.profile import Profile, watched_neurons
from hybrid_runtime.profiling.profile_file import read_profile, read_samples
from hybrid_runtime.profiling.run import ProfileRequest, make_profile
from hybrid_runtime.profiling.windows import token_windows
from hybrid_runtime.store.beside import store_digest
from hybrid_runtime.stores import ModelRequest, load_store_tokenizer
from tests.hybrid_runtime.model import oracles
from tests.hybrid_runtime.model.oracles import Oracle, turbosparse_mixtral_ffn

MODELS = Path(__file__).parents[3] / "benchmarks" / "models"
NAMES = (("Lily", "girl"), ("Tom", "boy"), ("Sue", "cat"), ("Max", "dog"))
THINGS = ("ball", "cake", "kite", "stone")
PLACES = ("in the garden", "by the sea", "under the tree", "at home")
WINDOW, NUM_TOKENS = 300, 900  # a window goes through the model in two batches, the second of an odd size
LEAST_ZEROS = 0.85
EDGE = 1e-4  # of a pre-activation near 1: float32 sums in another order differ by less, as the golden tests hold


def stories():
    """About 1100 tokens, no two stories alike."""
    told = []
    for idx in range(16):
        (name, kind), (other, _) = NAMES[idx % 4], NAMES[(idx + 1 + idx // 4 % 3) % 4]
        thing, place = THINGS[idx // 2 % 4], PLACES[idx // 3 % 4]
        told.append(
            f"Once upon a time, there was a little {kind} named {name}. {name} loved to play {place}. One day, {name} "
            f'saw a big red {thing}. "Can I have your {thing}?" asked {name}. {other} was sad and said no, because it '
            f"was {idx + 2} days old. Then they shared the {thing} and {other} was happy. They became good friends."
        )
    return "\n<|endoftext|>\n".join(told)


class Recount:
    """Counts by numpy. Gets what each network was given, in the order in which it was computed."""

    def __init__(self, config):
        self.config = config
        self.watched = watched_neurons(config).numpy()
        self.fires = defaultdict(list)  # (layer, expert) to bool [n, I] of each pass
        self.tokens = defaultdict(list)  # (layer, expert) to which of all tokens they are

    @classmethod
    def of(cls, made):
        recount = cls(made.config)
        for (layer_idx, expert_idx, tokens, x, _), start in made.passes():
            bundles = made.decoder.weights.layers[layer_idx].experts[expert_idx].bundles
            fires = fires_of(x, bundles)
            recount.fires[layer_idx, expert_idx].append(fires.numpy())
            recount.tokens[layer_idx, expert_idx].append(tokens.numpy() + start)
        return recount

    def rows(self, layer_idx, expert_idx):
        """Each token that went there, and which neurons fired for it."""
        for tokens, fires in zip(self.tokens[layer_idx, expert_idx], self.fires[layer_idx, expert_idx], strict=True):
            yield from zip(tokens.tolist(), fires, strict=True)

    def layer(self, layer_idx):
        experts, neurons = self.config.num_experts, self.config.intermediate_size
        nothing = [np.zeros((0, neurons), dtype=bool)], [np.zeros(0, dtype=np.int64)]
        found = [
            (np.concatenate(self.fires[key] or nothing[0]), np.concatenate(self.tokens[key] or nothing[1]))
            for key in ((layer_idx, expert_idx) for expert_idx in range(experts))
        ]
        counts = {
            "fired": np.stack([fires.sum(0) for fires, _ in found]),
            "tokens": np.array([len(fires) for fires, _ in found]),
            "active_squares": np.array([sum(int(row.sum()) ** 2 for row in fires) for fires, _ in found]),
            "co_fired": np.stack([self.pairs(fires[:, self.watched]) for fires, _ in found]),
        }
        return counts | {"where": [set(tokens.tolist()) for _, tokens in found]}

    @staticmethod
    def pairs(fires):
        return np.stack([(fires & fires[:, [idx]]).sum(0) for idx in range(fires.shape[1])])

    def require_equal(self, profile):
        layers = [self.layer(idx) for idx in range(self.config.num_hidden_layers)]
        for layer_idx, (mine, theirs) in enumerate(zip(layers, profile.layers, strict=True)):
            for name in ("fired", "tokens", "active_squares", "co_fired"):
                assert np.array_equal(mine[name], getattr(theirs, name).numpy()), (layer_idx, name)
            after = layers[layer_idx + 1]["where"] if layer_idx + 1 < len(layers) else []
            follows = [[len(before & behind) for behind in after] for before in mine["where"] if after]
            assert theirs.follows.tolist() == follows, layer_idx


def fires_of(x, bundles):
    """bool [n, I]: gate and up above 0, in the kernels' own sums; the reference's may differ at the edge alone."""
    rows = bundles.gate_proj, bundles.up_proj
    gate, up = (linear(x, each, team=Team(1)) for each in rows)
    fires = (gate > 0) & (up > 0)
    reference = torch.stack([rounded_linear(x, each) for each in rows])
    assert ((reference > 0).all(0) == fires)[reference.abs().amin(0) > EDGE].all()
    return fires


@dataclass(frozen=True, slots=True)
class Made:
    """A profile, the decoder that it was made with, and what that one's networks got meanwhile, in order."""

    decoder: Decoder
    profile: Profile
    windows: list[torch.Tensor]
    inputs: list[tuple]
    folder: Path

    @property
    def config(self):
        return self.decoder.config

    def passes(self):
        """Each network's inputs, and the number of the first token of its batch."""
        starts = [
            idx * len(tokens) + start
            for idx, tokens in enumerate(self.windows)
            for start in range(0, len(tokens), PREFILL_BATCH)
        ]
        batch_idx, last_layer = -1, self.config.num_hidden_layers
        for each in self.inputs:
            batch_idx += each[0] < last_layer
            last_layer = each[0]
            yield each, starts[batch_idx]
        assert batch_idx == len(starts) - 1


def profile_of(name, quant, folder, *, window=WINDOW, num_tokens=NUM_TOKENS):
    """Profile the model on folder/text."""
    opened = open_model(
        ModelRequest(name, quant), LoadOptions(num_positions=window, threads=1, cache_dir=folder / "cache")
    )
    sequence, (tokenizer, _) = opened.load_sequence(), load_store_tokenizer(opened.store)
    inputs = []
    feed_forward = Decoder._feed_forward

    def recording(decoder, layer_idx, expert_idx, tokens, x, predictor_input, observer):
        inputs.append((layer_idx, expert_idx, tokens.clone(), x.clone(), predictor_input.clone()))
        return feed_forward(decoder, layer_idx, expert_idx, tokens, x, predictor_input, observer)

    text = folder / "text"
    asked = ProfileRequest((text,), num_tokens, window, 1 << 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "_feed_forward", recording)
        make_profile(opened.store, sequence, tokenizer, asked, folder / "profile", lambda _: None)
    profile = read_profile(folder / "profile", opened.store.manifest.config, store_digest(opened.store))
    windows = list(token_windows([text], tokenizer, window))[: num_tokens // window]
    return Made(sequence.decoder, profile, windows, inputs, folder / "profile")


@pytest.fixture(scope="module", params=["tinystories-moe", "tinystories-moe-seed2"])
def profiled(request, tmp_path_factory):
    """The shipped model, and the one that was trained with another seed."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "text").write_text(stories())
    return profile_of(
        request.param if request.param == "tinystories-moe" else str(MODELS / request.param), "q8", folder
    )


@pytest.fixture(scope="module")
def recount(profiled):
    return Recount.of(profiled)


def test_counts_equal_a_brute_force_recount_exactly(profiled, recount):
    recount.require_equal(profiled.profile)
    assert profiled.profile.num_tokens == NUM_TOKENS


def test_at_least_85_percent_of_the_values_are_zero(profiled):
    assert profiled.profile.mean_zero_share >= LEAST_ZEROS


def test_sampled_tokens_are_what_the_networks_got_and_gave(profiled, recount):
    """Of each, the layer's input (in float16), its experts, and which of their neurons fired."""
    config = profiled.config
    inputs = defaultdict(dict)  # layer to token to input
    for (layer_idx, _, tokens, _, predictor_input), start in profiled.passes():
        inputs[layer_idx] |= dict(zip((tokens + start).tolist(), predictor_input, strict=True))
    for layer_idx in range(config.num_hidden_layers):
        samples = read_samples(profiled.folder, config, layer_idx)
        fires = {
            (token, expert_idx): row
            for expert_idx in range(config.num_experts)
            for token, row in recount.rows(layer_idx, expert_idx)
        }
        by_input = {value.half().numpy().tobytes(): token for token, value in inputs[layer_idx].items()}
        tokens = [by_input[row.numpy().tobytes()] for row in samples.inputs]
        assert len(set(tokens)) == len(samples.priorities) > 50
        for token, experts, active in zip(tokens, samples.experts.tolist(), samples.active.numpy(), strict=True):
            assert experts == sorted(expert for which, expert in fires if which == token)
            for expert_idx, row in zip(experts, active, strict=True):
                bits = np.unpackbits(row, bitorder="little")[: config.intermediate_size]
                assert np.array_equal(bits.astype(bool), fires[token, expert_idx])


def test_counts_are_the_oracles_but_for_neurons_at_the_edge_of_firing(tmp_path, monkeypatch):
    """On the float32 weights. The oracle computes whole windows, token by token, in float32."""
    window, name = 100, MODELS / "tinystories-moe-seed2"
    (tmp_path / "text").write_text(stories())
    made = profile_of(str(name), "f32", tmp_path, window=window, num_tokens=2 * window)
    config, tensors = made.config, load_file(name / "model.safetensors")
    seen = []  # network, its gate and up before the activation
    monkeypatch.setattr(oracles, "glu", partial(watched_glu, seen))
    ffn = turbosparse_mixtral_ffn(tensors, config.num_experts, config.num_experts_per_tok)
    heads = (config.num_attention_heads, config.num_key_value_heads)
    oracle = Oracle(tensors, ffn, *heads, num_layers=config.num_hidden_layers, theta=config.rope.theta)
    for tokens in made.windows:
        oracle.logits(tokens)
    edges = 0
    for layer_idx, layer in enumerate(made.profile.layers):
        for expert_idx in range(config.num_experts):
            network = f"model.layers.{layer_idx}.block_sparse_moe.experts.{expert_idx}"
            pairs = [torch.cat(pair) for which, *pair in seen if which == network]
            if not pairs:
                assert layer.tokens[expert_idx] == layer.fired[expert_idx].sum() == 0
                continue
            values = torch.stack(pairs)  # [n, 2, I]
            fires, may_fire = (values > EDGE).all(1).sum(0), (values > -EDGE).all(1).sum(0)
            assert len(values) == layer.tokens[expert_idx]  # else one was routed otherwise
            assert (layer.fired[expert_idx] >= fires).all()
            assert (layer.fired[expert_idx] <= may_fire).all()
            edges += int((may_fire - fires).sum())
    fired = sum(int(layer.fired.sum()) for layer in made.profile.layers)
    assert edges < 0.01 * fired  # the comparison says something


def watched_glu(seen, w, name, x, act, names, mask=1.0):
    gate, up = (x @ w[f"{name}.{each}.weight"].float().T for each in names[:2])
    seen.append((name, gate, up))
    return (act(gate, up) * mask) @ w[f"{name}.{names[2]}.weight"].float().T
