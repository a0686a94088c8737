"""Every neuron is in exactly one group, hot ones first; few groups say nearly what single neurons would."""

import numpy as np
import pytest

from hybrid_runtime.placement.grouping import group_neurons


def zipf_firings(num_experts, intermediate_size, seed=0):
    rng = np.random.default_rng(seed)
    firings = 1 / (1 + np.arange(num_experts * intermediate_size) / 20)
    return rng.permutation(firings).reshape(num_experts, intermediate_size)


def members(grouped, group_idx):
    neurons = grouped.order[grouped.bounds[group_idx] : grouped.bounds[group_idx + 1]]
    return neurons // grouped.intermediate_size, neurons % grouped.intermediate_size


@pytest.mark.parametrize("num_groups", [1, 7, 48, 1000])
@pytest.mark.parametrize("shape", [(1, 1), (1, 333), (8, 64)], ids=lambda shape: f"E{shape[0]}-I{shape[1]}")
def test_every_neuron_is_in_one_group_and_groups_cool_down(shape, num_groups):
    firings = zipf_firings(*shape)
    grouped = group_neurons(firings, num_groups)
    assert 1 <= len(grouped.groups) <= num_groups
    seen, coolest = set(), np.inf
    for group_idx, group in enumerate(grouped.groups):
        expert_idx, neuron_idx = members(grouped, group_idx)
        assert len(expert_idx) == group.num_neurons
        assert group.active == pytest.approx(firings[expert_idx, neuron_idx].sum())
        assert firings[expert_idx, neuron_idx].max() <= coolest
        coolest = firings[expert_idx, neuron_idx].min()
        seen |= set(zip(expert_idx.tolist(), neuron_idx.tolist(), strict=True))
    assert len(seen) == firings.size


def test_equal_neurons_keep_their_order():
    grouped = group_neurons(np.full((3, 4), 0.5), 12)
    assert grouped.order.tolist() == list(range(12))


@pytest.mark.parametrize("firings", [np.zeros((2, 50)), np.eye(1, 100)], ids=["none", "one"])
def test_neurons_that_never_fire_are_grouped_too(firings):
    grouped = group_neurons(firings, 8)
    assert sum(group.num_neurons for group in grouped.groups) == 100
    assert grouped.groups[-1].active == 0


def test_cuts_are_finer_where_neurons_fire_often():
    sizes = [group.num_neurons for group in group_neurons(zipf_firings(8, 1000), 48).groups]
    assert sizes[0] < sizes[-1] / 4


@pytest.mark.parametrize(
    ("firings", "num_groups", "message"),
    [
        (np.zeros(4), 4, r"firings are \[4\]"),
        (np.zeros((0, 4)), 4, r"firings are \[0, 4\]"),
        (np.zeros((1, 4)), 0, "num_groups 0"),
        (np.full((1, 4), 1.5), 4, "1.5, expected 0 to 1"),
        (np.full((1, 4), np.nan), 4, "nan, expected 0 to 1"),
    ],
)
def test_nonsense_is_refused(firings, num_groups, message):
    with pytest.raises(ValueError, match=message):
        group_neurons(firings, num_groups)
