"""Shares of tokens for which neurons fire: the mean and the skew that were asked for."""

from __future__ import annotations

import numpy as np
import pytest

from hybrid_runtime.synthetic.firing_rates import COUNTED, firing_rates, skew_limits, skew_of


@pytest.mark.parametrize("active", [0.005, 0.03, 0.12, 0.4, 0.9])
@pytest.mark.parametrize("place", [0.02, 0.3, 0.7, 0.98])
@pytest.mark.parametrize("num_neurons", [14336, 768])
def test_mean_and_skew_are_as_asked(active, place, num_neurons):
    lowest, highest = skew_limits(active)
    skew = lowest + place * (highest - lowest)
    rates = firing_rates(num_neurons, active, skew)
    assert rates.shape == (num_neurons,)
    assert rates.mean() == pytest.approx(active, rel=0.02, abs=0.5 / num_neurons)
    assert skew_of(rates) == pytest.approx(skew, abs=0.005)
    assert (rates > 0).all()
    assert (rates < 1).all()
    assert (np.diff(rates) >= 0).all()


def test_skew_is_the_share_of_neurons_that_makes_most_activations():
    assert COUNTED == 0.8
    assert skew_of(np.ones(10)) == 0.8
    assert skew_of(np.array([0, 0, 0, 0, 1.0])) == 0.2
    assert skew_of(np.array([4, 1, 4, 1])) == 0.5


@pytest.mark.parametrize("active", [0.005, 0.12, 0.9])
def test_no_neurons_can_be_more_uneven_than_always_or_never_nor_more_even_than_alike(active):
    lowest, highest = skew_limits(active)
    assert 0.8 * active - 0.001 <= lowest < 0.9 * active + 0.01  # counted in whole neurons
    assert 0.75 < highest <= 0.801
