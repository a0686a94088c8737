"""Curves and thresholds against counting everything by hand."""

import pytest
import torch

from hybrid_predictors import thresholds
from hybrid_predictors.thresholds import Quality, curve, measured_sets, spend


def random_case(seed, num_tokens=40, num_neurons=30, density=0.2):
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(num_tokens, num_neurons, generator=generator) < density
    logits = torch.randn(num_tokens, num_neurons, generator=generator) + 2.0 * active
    return logits, active


def test_quality_counts_what_is_found_and_what_is_named():
    named = torch.tensor([[True, True, False, False]])
    active = torch.tensor([[True, False, True, False]])
    quality = measured_sets(named, active)
    assert quality == Quality(found=1, fired=2, named=2, values=4)
    assert (quality.recall, quality.precision, quality.density_ratio) == (0.5, 0.5, 1.0)
    assert (quality.predicted_density, quality.true_density) == (0.5, 0.5)
    assert quality + quality == Quality(2, 4, 4, 8)


def test_quality_of_nothing_is_perfect():
    quality = Quality(0, 0, 0, 0)
    assert (quality.recall, quality.precision, quality.density_ratio) == (1, 1, 1)
    assert (quality.predicted_density, quality.true_density) == (0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_every_point_of_a_curve_is_what_its_threshold_gives(seed):
    cases = [random_case(seed), random_case(seed + 100, num_tokens=7), random_case(seed + 200, density=0.0)]
    found = curve([logits for logits, _ in cases], [active for _, active in cases])
    for idx, threshold in enumerate(found.thresholds.tolist()):
        expected = Quality(0, 0, 0, 0)
        for logits, active in cases:
            expected = expected + measured_sets(logits.double() > threshold, active)
        assert found.at(idx) == expected


def test_values_are_counted_in_chunks_as_at_once(monkeypatch):
    logits, active = random_case(7)
    at_once = curve([logits], [active])
    monkeypatch.setattr(thresholds, "CHUNK", 17)
    in_chunks = curve([logits], [active])
    for field in ("thresholds", "found", "named"):
        assert torch.equal(getattr(in_chunks, field), getattr(at_once, field))


@pytest.mark.parametrize("recall", [0.01, 0.5, 0.9, 0.97, 1.0])
def test_threshold_for_a_recall_is_the_highest_that_reaches_it(recall):
    logits, active = random_case(3)
    found = curve([logits], [active])
    idx = found.for_recall(recall)
    assert found.at(idx).recall >= recall
    assert idx == len(found.thresholds) - 1 or found.at(idx + 1).recall < recall


def test_equal_logits_stand_or_fall_together():
    logits = torch.zeros(3, 4)
    active = torch.zeros(3, 4, dtype=torch.bool)
    active[0, 0] = True
    found = curve([logits], [active])
    assert found.at(found.for_recall(1.0)) == Quality(1, 1, 12, 12)


def test_layer_in_which_nothing_fires_names_nothing():
    logits, _ = random_case(1)
    found = curve([logits], [torch.zeros_like(logits, dtype=torch.bool)])
    assert found.at(found.for_recall(0.97)) == Quality(0, 0, 0, logits.numel())


def exhaustive(curves, recall):
    """The fewest named neurons of any choice of thresholds that reaches the recall."""
    reached = {0.0: 0.0}  # found so far to the fewest named
    for each in curves:
        following = {}
        for found, named in reached.items():
            for idx in range(len(each.thresholds)):
                key = found + float(each.found[idx])
                following[key] = min(following.get(key, float("inf")), named + float(each.named[idx]))
        reached = following
    fired = sum(each.fired for each in curves)
    return min(named for found, named in reached.items() if found >= recall * fired)


@pytest.mark.parametrize("recall", [0.8, 0.97])
@pytest.mark.parametrize("seed", range(5))
def test_layers_together_name_hardly_more_than_the_best_choice_there_is(seed, recall):
    cases = [random_case(seed * 3 + idx, density=0.1 + 0.1 * idx) for idx in range(3)]
    curves = [curve([logits], [active]) for logits, active in cases]
    chosen = spend(curves, recall)
    total = sum((each.at(idx) for each, idx in zip(curves, chosen, strict=True)), Quality(0, 0, 0, 0))
    assert total.recall >= recall
    # one price for all layers reaches the convex hull of what can be had: off it by less than one step of one layer
    steps = max(float((each.named[:-1] - each.named[1:]).max()) for each in curves)
    assert total.named <= exhaustive(curves, recall) + steps


def test_no_layer_falls_below_its_own_least_recall():
    good = curve([torch.tensor([[5.0, 5.0, -5.0, -5.0]] * 999)], [torch.tensor([[True, True, False, False]] * 999)])
    _, active = random_case(1)
    hopeless = curve([random_case(2)[0]], [active])
    assert hopeless.at(spend([good, hopeless], 0.5)[1]).recall < 0.9
    assert hopeless.at(spend([good, hopeless], 0.5, least_recall=0.9)[1]).recall >= 0.9
