"""Which bias makes a neuron fire for a given share of tokens, from the quantised weights themselves.

A logit is a sum over hundreds of coordinates that vary independently from token to token, so it is normal, with a mean
and a variance that follow from the row's weights; the bias then is a quantile. Checked by running models (tests).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hybrid_runtime.synthetic.stream import CONSTANT, Stream


@dataclass(frozen=True, slots=True)
class HiddenUnits:
    """Mean and variance over tokens, float64 [rank], of what a predictor's first layer hands on. Unit 0 is constant."""

    means: torch.Tensor
    variances: torch.Tensor


def hidden_units(fc1: torch.Tensor, stream: Stream) -> HiddenUnits:
    """fc1: float32 [rank, H], whose first row reads the constant coordinate alone."""
    means, variances = rectified(fc1[:, 0].double() * CONSTANT, _weighted_squares(fc1, stream.variances))
    return HiddenUnits(means, variances)


def predictor_biases(fc2: torch.Tensor, units: HiddenUnits, rates: torch.Tensor, threshold: float) -> torch.Tensor:
    """First column of fc2 that makes neuron i fire for the share rates[i] of tokens.

    fc2: float32 [N, rank], the first column zero; rates: float64 [N] -> float64 [N].
    """
    spread = _weighted_squares(fc2, units.variances).sqrt()
    quantiles: torch.Tensor = torch.special.ndtri(rates)
    wanted = spread * quantiles - (fc2 @ units.means.float()).double() + threshold
    return wanted / units.means[0]


def gate_biases(gate_proj: torch.Tensor, stream: Stream, rates: torch.Tensor, threshold: float) -> torch.Tensor:
    """First column of a gate (of an up projection without one) whose value is above threshold that often.

    gate_proj: float32 [N, H], the first column zero, reading the normed stream; rates: float64 [N] -> float64 [N].
    """
    spread = _weighted_squares(gate_proj, stream.variances).sqrt() / stream.rms
    quantiles: torch.Tensor = torch.special.ndtri(rates)
    return (spread * quantiles + threshold) * stream.rms / CONSTANT


def rectified(means: torch.Tensor, variances: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of max(0, x) for normal x."""
    std = variances.sqrt().clamp(min=1e-30)
    above = torch.special.ndtr(means / std)
    density = torch.exp(-0.5 * (means / std).square()) / math.sqrt(2 * math.pi)
    first = means * above + std * density
    second = (means.square() + variances) * above + means * std * density
    return first, (second - first.square()).clamp(min=0)


def _weighted_squares(weights: torch.Tensor, variances: torch.Tensor) -> torch.Tensor:
    """weights: float32 [N, K]; variances: float64 [K] -> float64 [N]."""
    return (weights.square() @ variances.float()).double()  # in float64 it would take twice the memory of the layer
