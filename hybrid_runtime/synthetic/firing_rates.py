"""How often each neuron of a synthetic FFN fires: shares between 0 and 1 with a given mean and a given skew.

They are the quantiles of a beta distribution, which reaches from "all neurons alike" to "some always, the others
never" as its one free number goes from large to small. *skew* is the measure that PowerInfer's paper gives: the share
of neurons that, the busiest first, make 80 % of all activations. The smaller, the more uneven.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt

COUNTED = 0.8  # of all activations
GATED_SKEW = 0.43  # LLaMA-2-70B with ReGLU, one FFN (powerinfer.md §3)
UNGATED_SKEW = 0.26  # OPT-30B, one FFN
RAREST = 1e-6  # share of tokens

Shares = npt.NDArray[np.float64]

_SOLVER_NEURONS = 4096
_GRID_POINTS = 20_001
_SMALLEST_CONCENTRATION, _LARGEST_CONCENTRATION = 0.2, 1e4
_BISECTIONS = 40


def firing_rates(num_neurons: int, active: float, skew: float) -> Shares:
    """Float64 [num_neurons], rarest first: their mean is active, and skew is what `skew_of` finds."""
    return _beta_quantiles(num_neurons, active, _concentration(active, skew))


def skew_of(rates: Shares) -> float:
    """The share of neurons that makes COUNTED of all activations. rates: [I], shares or counts, in any order."""
    busiest_first = np.sort(np.asarray(rates, dtype=np.float64))[::-1]
    total = np.cumsum(busiest_first)
    return float(np.searchsorted(total, COUNTED * total[-1]) + 1) / len(rates)


def skew_limits(active: float) -> tuple[float, float]:
    """The most and the least uneven that neurons can be that fire for a share `active` of tokens on average."""
    limits = (_SMALLEST_CONCENTRATION, _LARGEST_CONCENTRATION)
    lowest, highest = (skew_of(_beta_quantiles(_SOLVER_NEURONS, active, each)) for each in limits)
    return lowest, highest


@cache  # the same for hundreds of experts
def _concentration(active: float, skew: float) -> float:
    """The beta distribution's alpha + beta that gives this skew: bisection, since the skew grows with it."""
    low, high = math.log(_SMALLEST_CONCENTRATION), math.log(_LARGEST_CONCENTRATION)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if skew_of(_beta_quantiles(_SOLVER_NEURONS, active, math.exp(middle))) < skew:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def _beta_quantiles(num_neurons: int, mean: float, concentration: float) -> Shares:
    """At the middles of num_neurons equal steps of probability, from the distribution function on a grid of logits."""
    alpha, beta = mean * concentration, (1 - mean) * concentration
    centre = math.log(mean / (1 - mean))
    # Far enough out that what is cut off does not count: the density falls as exp(alpha z) and exp(-beta z).
    logits = np.linspace(centre - 30 / alpha - 5, centre + 30 / beta + 5, _GRID_POINTS)
    if concentration > 1:  # it falls faster than that near the centre, and narrow peaks need a finer grid
        width = 40 / math.sqrt(concentration * mean * (1 - mean))
        logits = np.linspace(max(logits[0], centre - 2 * width), min(logits[-1], centre + width), _GRID_POINTS)
    log_density = -alpha * np.logaddexp(0, -logits) - beta * np.logaddexp(0, logits)
    probability = np.cumsum(np.exp(log_density - log_density.max()))
    steps = (np.arange(num_neurons) + 0.5) / num_neurons
    middle = np.interp(steps, probability / probability[-1], logits)
    return np.clip(0.5 + 0.5 * np.tanh(middle / 2), RAREST, 1 - RAREST)
