"""Counting what fires and dropping what matters least, each against a loop that nobody could misread."""

import math

import pytest
import torch
from torch.nn import functional

from hybrid_tools.training.held_out import HeldOut, mean_losses
from hybrid_tools.training.initial import random_weights
from hybrid_tools.training.network import forward
from hybrid_tools.training.recipe import Shape, activation_of
from hybrid_tools.training.sparsity import Firing, count_firing, keep_largest, losses_when_kept

VOCABULARY = 60


def model(activation="drelu", num_experts=4, seed=1):
    shape = Shape(
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=num_experts,
    )
    config = shape.config(activation_of(activation, 0.0), VOCABULARY, 1, 2)
    weights = random_weights(config, seed)
    return config, {name: weight * (10 if weight.ndim > 1 else 1) for name, weight in weights.items()}  # far from even


@pytest.fixture
def held_out():
    generator = torch.Generator().manual_seed(3)
    return HeldOut(
        {
            "a.txt": torch.randint(VOCABULARY, (3, 17), generator=generator),
            "b.txt": torch.randint(VOCABULARY, (20, 17), generator=generator),  # more than a batch
        }
    )


@pytest.mark.parametrize("num_experts", [0, 4], ids=["dense", "mixture"])
def test_counts_are_those_of_a_recount_row_by_row(num_experts, held_out):
    config, weights = model(num_experts=num_experts)
    firing, losses = count_firing(config, weights, held_out)
    counts = [torch.zeros(max(1, num_experts), 24, dtype=torch.int64) for _ in range(2)]
    rows = [[0] * max(1, num_experts) for _ in range(2)]

    def recount(layer_idx, expert_idx, hidden):
        for row in hidden:
            rows[layer_idx][expert_idx] += 1
            for neuron, value in enumerate(row.tolist()):
                counts[layer_idx][expert_idx, neuron] += value != 0.0
        return hidden

    for sequences in held_out.sequences.values():
        forward(config, weights, sequences[:, :-1], recount)
    assert all(torch.equal(found, expected) for found, expected in zip(firing.counts, counts, strict=True))
    assert [each.tolist() for each in firing.rows] == rows
    assert sum(rows[0]) == 23 * 16 * (2 if num_experts else 1)
    assert 0.3 < firing.mean_zero_share < 0.99
    assert losses == mean_losses(config, weights, held_out)


def test_shares_are_of_tokens_that_an_expert_saw_and_a_silent_expert_has_none():
    counts = torch.tensor([[4, 0, 2, 2], [1, 1, 1, 1], [0, 0, 0, 0]])
    firing = Firing((counts,), (torch.tensor([4, 2, 0]),))
    assert firing.zero_share(0) == 1 - 12 / 24
    first, second, silent = firing.expert_zero_shares(0)
    assert (first, second) == (0.5, 0.5)
    assert math.isnan(silent)
    assert firing.cumulative(0)[:3].tolist() == [4 / 12, 6 / 12, 8 / 12]
    assert firing.is_sparse
    assert firing.neurons_for(0.3, 0) == 1 / 12  # four of twelve firings are one neuron's
    assert firing.neurons_for(0.5, 0) == 2 / 12
    assert firing.neurons_for(1.0, 0) == 7 / 12


def test_a_layer_that_never_fires_has_no_cumulative_share():
    silent = Firing((torch.zeros(1, 4, dtype=torch.int64),), (torch.tensor([3]),))
    assert silent.cumulative(0).tolist() == [0.0] * 4
    assert silent.zero_share(0) == 1.0


def test_what_is_kept_is_what_adds_most_to_the_stream():
    hidden = torch.tensor([[3.0, -2.0, 1.0, 0.0], [0.5, 0.0, 0.0, -9.0]])
    norms = torch.tensor([1.0, 2.0, 10.0, 0.1])
    assert keep_largest(hidden, norms, 2).tolist() == [[0.0, -2.0, 1.0, 0.0], [0.5, 0.0, 0.0, -9.0]]
    assert torch.equal(keep_largest(hidden, norms, 4), hidden)


def test_keeping_everything_costs_nothing_and_keeping_less_costs_more(held_out):
    config, weights = model("swiglu")
    losses = losses_when_kept(config, weights, held_out, (1.0, 0.5, 0.05))
    exact = mean_losses(config, weights, held_out)["all"]
    assert losses[1.0] == pytest.approx(exact, abs=1e-6)
    assert abs(losses[0.05] - exact) > abs(losses[0.5] - exact) > 0


def test_keeping_more_than_ever_fires_changes_nothing(held_out):
    config, weights = model("drelu")
    firing, losses = count_firing(config, weights, held_out)
    assert firing.mean_zero_share > 0.5
    most = 0

    def look(layer_idx, expert_idx, hidden):
        nonlocal most
        most = max(most, int((hidden != 0).sum(dim=1).max()))
        return hidden

    mean_losses(config, weights, held_out, look)
    kept = losses_when_kept(config, weights, held_out, (most / 24,))
    assert next(iter(kept.values())) == pytest.approx(losses["all"], abs=1e-6)


def test_mean_loss_is_over_tokens_not_over_files(held_out):
    config, weights = model()
    losses = mean_losses(config, weights, held_out)
    by_token = []
    for sequences in held_out.sequences.values():
        logits = forward(config, weights, sequences[:, :-1]).logits
        by_token.append(
            functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten(), reduction="none").double()
        )
    assert losses["a.txt"] == pytest.approx(by_token[0].mean().item(), abs=1e-6)
    assert losses["b.txt"] == pytest.approx(by_token[1].mean().item(), abs=1e-6)
    assert losses["all"] == pytest.approx(torch.cat(by_token).mean().item(), abs=1e-6)
    assert held_out.num_tokens == 23 * 16
