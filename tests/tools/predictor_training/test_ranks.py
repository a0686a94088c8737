"""Ranks spend bytes where there is most to tell apart, and never more than there are."""

import itertools

import pytest
import torch

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.model.trained_predictors import pack_layer
from hybrid_runtime.profiling.profile import LayerCounts
from hybrid_tools.predictor_training.ranks import (
    firing_entropy,
    grown_rank,
    initial_ranks,
    layer_bytes,
    rank_ladder,
    widest_rank,
)
from tests.hybrid_runtime.placement.made_up import mixture_of

Q4, Q8, F32 = RowFormat("q4", 32), RowFormat("q8", 32), RowFormat("f32")
NOTHING = torch.zeros(0, 0, dtype=torch.int64)
WIDE = mixture_of(hidden_size=256, num_attention_heads=4, head_dim=64, intermediate_size=384)


def counts_of(fired, num_tokens=1000):
    """One expert, of which neuron i fired fired[i] times."""
    return LayerCounts(torch.tensor([fired]), torch.tensor([num_tokens]), torch.zeros(1).long(), NOTHING, NOTHING)


@pytest.mark.parametrize("row_format", [Q4, Q8, F32], ids=str)
@pytest.mark.parametrize("config", [WIDE, mixture_of()], ids=["dense", "mixture"])
@pytest.mark.parametrize("rank", [16, 96])
def test_bytes_are_those_of_the_packed_predictors(row_format, config, rank):
    fc1 = torch.randn(rank, config.hidden_size)
    experts = [(fc1, torch.randn(config.intermediate_size, rank)) for _ in range(max(1, config.num_experts))]
    packed = pack_layer(experts, row_format, 0.0, has_relu=True)
    assert all(each.fc1 is packed[0].fc1 for each in packed)  # held once
    total = packed[0].fc1.num_bytes + sum(each.fc2.num_bytes for each in packed)
    assert layer_bytes(config, row_format, rank) == total


def test_a_ladder_climbs_in_steps_that_cost_something():
    ladder = rank_ladder(WIDE, Q4)
    assert ladder == [32, 64, 96, 128, 160, 192, 224, 256]  # whole groups: between them a rank buys padding
    assert rank_ladder(WIDE, F32)[:3] == [16, 32, 48]
    sizes = [layer_bytes(WIDE, Q4, rank) for rank in ladder]
    assert all(more >= 1.1 * less for less, more in itertools.pairwise(sizes))


def test_entropy_is_that_of_coins():
    assert firing_entropy(counts_of([500, 500])) == pytest.approx(2.0)
    assert firing_entropy(counts_of([1000, 0])) == 0.0  # always and never are no news
    assert firing_entropy(counts_of([110])) == pytest.approx(0.4999, abs=1e-3)


def test_what_is_hard_to_tell_gets_the_ranks():
    layers = [counts_of([500] * 384), counts_of([10] * 384), counts_of([100] * 384)]
    budget = 3 * layer_bytes(WIDE, Q4, 128)
    ranks = initial_ranks(WIDE, Q4, layers, budget)
    assert ranks[0] > ranks[2] > ranks[1]
    assert sum(layer_bytes(WIDE, Q4, rank) for rank in ranks) <= budget
    assert initial_ranks(WIDE, Q4, layers, 0.0) == [32, 32, 32]  # there is no less


def test_the_step_that_gains_most_for_its_bytes_is_next():
    ranks = [96, 96]
    ample = 10 * layer_bytes(WIDE, Q4, 256)
    assert grown_rank(WIDE, Q4, ranks, [1.0, 5.0], ample) == (1, 128)
    assert grown_rank(WIDE, Q4, ranks, [1.0, 5.0], sum(layer_bytes(WIDE, Q4, rank) for rank in ranks)) is None
    assert grown_rank(WIDE, Q4, [256, 256], [1.0, 5.0], ample) is None
    assert grown_rank(WIDE, Q4, [96, 256], [1.0, 5.0], ample) == (0, 128)
    assert grown_rank(WIDE, Q4, [32, 96], [1.0, 5.0], ample, widest=96) == (0, 64)


def test_no_layer_grows_beyond_what_memory_was_set_aside_for():
    layers = [counts_of([500] * 384), counts_of([10] * 384)]
    budget = 2 * layer_bytes(WIDE, Q4, 96)
    widest = widest_rank(WIDE, Q4, layers, budget)
    assert widest == max(
        rank for rank in rank_ladder(WIDE, Q4) if rank <= 2 * max(initial_ranks(WIDE, Q4, layers, budget))
    )
    assert widest_rank(WIDE, Q4, layers, 0.0) == 64
