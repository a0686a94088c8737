"""What a report says of counts, against counts that were planted and oracles written here."""

import json
import math

import numpy as np
import pytest
import torch

from hybrid_runtime.profiling.profile import LayerCounts, Profile, TextDigest
from hybrid_tools.foreign_statistics import ActivationHistograms, ExpertPopularity, Histogram
from hybrid_tools.inspection.facts import (
    CURVE,
    FIRING_SHARES,
    HISTOGRAM_SHARES,
    MOST_CORRELATED,
    PlacementLayer,
    PredictorLayer,
    Report,
    entropy_bits,
    firing_curve,
    histogram_facts,
    popularity_facts,
    profile_facts,
)


def counted(active, experts=None, num_experts=1, follows=None, watched=None):
    """LayerCounts of bool [T, I] by plain loops. experts: [T], which one each token went to."""
    num_tokens, num_neurons = active.shape
    experts = torch.zeros(num_tokens, dtype=int) if experts is None else experts
    watched = torch.arange(num_neurons) if watched is None else watched
    of_expert = [active[experts == idx].long() for idx in range(num_experts)]
    return LayerCounts(
        fired=torch.stack([each.sum(0) for each in of_expert]),
        tokens=torch.tensor([len(each) for each in of_expert]),
        active_squares=torch.stack([each.sum(1).square().sum() for each in of_expert]),
        co_fired=torch.stack([each[:, watched].T @ each[:, watched] for each in of_expert]),
        follows=torch.zeros(0, 0, dtype=int) if follows is None else follows,
    )


def profile_of(*layers, num_tokens, num_watched=0):
    text = TextDigest("ab" * 32, num_tokens)
    held_out = torch.zeros(0, 64, dtype=torch.int32)
    return Profile("a model", "cd" * 32, (text,), 64, torch.arange(num_watched), layers, held_out)


@pytest.fixture
def dense():
    """Two layers of 8 neurons over 1000 tokens: in the first, neurons 0 to 3 fire all together; 7 never fires."""
    generator = torch.Generator().manual_seed(0)
    together = (torch.rand(1000, 1, generator=generator) < 0.3).expand(1000, 4)
    alone = torch.rand(1000, 3, generator=generator) < 0.2
    never = torch.zeros(1000, 1, dtype=torch.bool)
    second = torch.rand(1000, 8, generator=generator) < 0.5
    return profile_of(counted(torch.cat([together, alone, never], 1)), counted(second), num_tokens=1000, num_watched=8)


@pytest.fixture
def mixture():
    """Two layers of 4 experts; the next layer's expert is that of this one, but expert 3 gets no token."""
    experts = torch.arange(999) % 3
    active = torch.rand(999, 6, generator=torch.Generator().manual_seed(1)) < 0.25
    follows = torch.diag(torch.tensor([333, 333, 333, 0]))
    return profile_of(counted(active, experts, 4, follows), counted(active, experts, 4), num_tokens=999, num_watched=6)


def test_curve_rises_to_all_firings_and_names_the_neurons_that_make_them():
    fired = torch.tensor([0, 60, 20, 0, 10, 5, 5, 0, 0, 0])
    curve = firing_curve(fired)
    assert curve.dead == 0.5
    assert curve.needed == (0.1, 0.2, 0.4)  # 60 of 100; 60 + 20; 60 + 20 + 10 + 5
    assert len(curve.cumulative) == len(CURVE)
    assert curve.cumulative[0] == 0
    assert curve.cumulative[-1] == 1
    assert list(curve.cumulative) == sorted(curve.cumulative)
    assert curve.cumulative[CURVE.index(0.25)] == pytest.approx(0.8)  # of 2.5 neurons, rounded to even


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_neurons_that_fire_alike_make_a_straight_line(count):
    curve = firing_curve(torch.full((count,), 3))
    for share, needed in zip(FIRING_SHARES, curve.needed, strict=True):
        assert share <= needed + 1e-9 < share + 1 / count + 1e-9
    for share, reached in zip(CURVE, curve.cumulative, strict=True):
        assert abs(reached - share) <= 0.5 / count + 1e-9


def test_where_nothing_fired_there_is_no_curve():
    assert firing_curve(torch.zeros(5, dtype=int)) is None
    facts = profile_facts(profile_of(counted(torch.zeros(10, 4, dtype=torch.bool)), num_tokens=10, num_watched=4))
    assert (facts.firing, facts.layers[0].firing, facts.layers[0].spread, facts.correlation) == (None, None, None, None)
    assert facts.zero_share == 1
    json.dumps(Report("t", facts).to_json(), allow_nan=False)


def test_layers_say_what_was_planted(dense):
    facts = profile_facts(dense)
    first, second = facts.layers
    assert facts.num_tokens == 1000
    assert not facts.is_mixture
    assert first.firing.dead == 1 / 8
    assert facts.firing.dead == 1 / 16
    assert first.zero_share == dense.zero_share(0)
    assert first.expert_zero_shares == (pytest.approx(first.zero_share),)
    assert first.spread > 2
    assert second.spread == pytest.approx(1, abs=0.2)
    assert (first.expert_shares, first.expert_entropy, first.transition_bits) == ((), None, None)
    assert facts.transitions == ()


def test_correlation_is_that_of_the_layer_whose_neurons_fire_together_most(dense):
    correlation = profile_facts(dense).correlation
    assert (correlation.layer_idx, correlation.expert_idx) == (0, 0)
    assert sorted(correlation.neurons) == list(range(7))  # 7 never fires, and correlates with nothing
    matrix = np.array(correlation.coefficients)
    places = [correlation.neurons.index(neuron) for neuron in range(4)]
    assert max(places) - min(places) == 3  # side by side
    np.testing.assert_allclose(matrix[np.ix_(places, places)], 1, atol=1e-9)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    others = [place for place in range(7) if place not in places]
    assert np.abs(matrix[np.ix_(places, others)]).max() < 0.15


def test_correlation_equals_numpys():
    active = torch.rand(400, 100, generator=torch.Generator().manual_seed(2)) < 0.3
    correlation = profile_facts(profile_of(counted(active), num_tokens=400, num_watched=100)).correlation
    assert len(correlation.neurons) == MOST_CORRELATED
    expected = np.corrcoef(active.numpy().T)[np.ix_(correlation.neurons, correlation.neurons)]
    np.testing.assert_allclose(correlation.coefficients, expected, atol=1e-12)


def test_routing_is_told_in_bits(mixture):
    facts = profile_facts(mixture)
    first, last = facts.layers
    assert facts.is_mixture
    assert first.expert_shares == (1 / 3, 1 / 3, 1 / 3, 0)
    assert first.expert_entropy == pytest.approx(math.log2(3))
    assert first.transition_bits == pytest.approx(math.log2(3))
    assert last.transition_bits is None
    assert first.expert_zero_shares[3] is None
    (lift,) = facts.transitions
    assert lift[0][0] == pytest.approx(math.log2(3))
    assert lift[0][1] < -7  # 111 pairs by chance, none seen
    assert lift[3] == (0, 0, 0, 0)


def test_independent_routing_tells_nothing_of_the_next_layer():
    follows = torch.tensor([[40, 10], [80, 20]])
    layers = [counted(torch.ones(3, 2, dtype=torch.bool), torch.tensor([0, 1, 1]), 2, each) for each in (follows, None)]
    facts = profile_facts(profile_of(*layers, num_tokens=3))
    assert facts.layers[0].transition_bits == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(facts.transitions[0], 0, atol=1e-12)


def test_profile_without_pairs_has_no_spread(dense):
    bare = profile_of(*dense.layers, num_tokens=1000, num_watched=0)
    facts = profile_facts(bare)
    assert [layer.spread for layer in facts.layers] == [None, None]
    assert facts.correlation is None


def test_entropy_is_in_bits():
    assert entropy_bits(torch.tensor([0.25] * 4)) == 2
    assert entropy_bits(torch.tensor([1.0, 0.0])) == 0


def test_published_orders_and_histograms_become_facts():
    popularity = popularity_facts(ExpertPopularity(((1, 0), (0, 1), (0, 0), (1, 1))))
    assert popularity.places == ((2, 1), (0, 3))
    assert popularity.order == ((1, 0), (0, 1))
    histogram = Histogram(np.array([10, 80, 10]), np.array([-1.0, 0.5, 2.0]))
    (tensor,) = histogram_facts(ActivationHistograms({"mlp.h2": (histogram, histogram)}))
    assert (tensor.tensor, tensor.num_values) == ("mlp.h2", 100)
    assert tensor.magnitudes == ((0.5,) * (len(HISTOGRAM_SHARES) - 1) + (1.0,),) * 2


def test_report_is_plain_json(mixture):
    report = Report(
        "t",
        profile_facts(mixture),
        (PredictorLayer(0, "mlp", 64, 0.9, None, 0.1, 0.05, 4096),),
        (PlacementLayer(0, 10, 20, 0, "output"),),
        remarks=("a plan of nobody",),
    )
    values = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert values["profile"]["layers"][0]["expert_entropy"] == pytest.approx(math.log2(3))
    assert "transitions" not in values["profile"]
    assert values["predictors"][0]["precision"] is None
    assert values["placement"] == [
        {"layer_idx": 0, "gpu_neurons": 10, "ram_neurons": 20, "disk_neurons": 0, "merge": "output"}
    ]
    assert values["popularity"] is None
    assert values["remarks"] == ["a plan of nobody"]
