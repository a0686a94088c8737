"""Thresholds: how many of the neurons that fire a predictor must find, against how many it names for that.

One network's logits over a sample give a curve: for every threshold the recall, and the neurons named. A layer has one
threshold (that is what decoding compares with), so its experts' logits go into one curve. `spend` then sets all layers'
thresholds together: the same total recall costs least when the last neuron found costs every layer as many named ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

NUM_BINS = 4096
CHUNK = 1 << 20  # values that are counted at a time, 32 MiB with their order


@dataclass(frozen=True, slots=True)
class Quality:
    """found: neurons that fire and are named; fired, named: in all; values: neurons times tokens that were seen."""

    found: float
    fired: float
    named: float
    values: float

    @property
    def recall(self) -> float:
        """Share of what fires that is named; 1 where nothing fires."""
        return self.found / self.fired if self.fired else 1.0

    @property
    def precision(self) -> float:
        """Share of what is named that fires; 1 where nothing is named."""
        return self.found / self.named if self.named else 1.0

    @property
    def predicted_density(self) -> float:
        """Share of all neurons that is named."""
        return self.named / self.values if self.values else 0.0

    @property
    def true_density(self) -> float:
        """Share of all neurons that fires."""
        return self.fired / self.values if self.values else 0.0

    @property
    def density_ratio(self) -> float:
        """Named neurons for one that fires."""
        return self.named / self.fired if self.fired else 1.0

    def __add__(self, other: Quality) -> Quality:
        """Of both samples together."""
        return Quality(
            self.found + other.found, self.fired + other.fired, self.named + other.named, self.values + other.values
        )


def measured_sets(named: torch.Tensor, active: torch.Tensor) -> Quality:
    """named: bool [n, I], what was predicted to fire; active: bool [n, I], what did."""
    return Quality(float((named & active).sum()), float(active.sum()), float(named.sum()), float(active.numel()))


@dataclass(frozen=True, slots=True)
class Curve:
    """A layer's qualities at ascending thresholds. thresholds: float64 [B]; found, named: float64 [B]."""

    thresholds: torch.Tensor
    found: torch.Tensor
    named: torch.Tensor
    fired: float
    values: float

    def at(self, idx: int) -> Quality:
        """The quality at one of the thresholds."""
        return Quality(float(self.found[idx]), self.fired, float(self.named[idx]), self.values)

    def for_recall(self, recall: float) -> int:
        """Index of the highest threshold that reaches the recall; 0 where none does."""
        enough = (self.found >= recall * self.fired).nonzero()
        return int(enough[-1]) if len(enough) else 0

    def cheapest(self, price: float) -> int:
        """Index of the threshold that names least, when a neuron that is found is worth `price` named ones."""
        return int((self.named - price * self.found).argmin())


def curve(logits: Sequence[torch.Tensor], active: Sequence[torch.Tensor]) -> Curve:
    """One layer's curve from its experts' logits [n, I] and what fired, bool [n, I].

    The thresholds lie at quantiles of the logits of neurons that fired, since only there does the recall change; the
    lowest names everything.
    """
    values = float(sum(each.numel() for each in active))
    fired = torch.cat([each[which] for each, which in zip(logits, active, strict=True)])
    fired.numpy().sort()  # in place: torch's sort takes six times as much memory, for the order that nobody asks
    if len(fired) == 0:
        highest = max(float(each.max()) for each in logits if each.numel()) if values else 0.0
        thresholds = torch.tensor([highest], dtype=torch.float64)
        return Curve(thresholds, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), 0.0, values)
    places = torch.linspace(0, len(fired) - 1, min(NUM_BINS, len(fired))).long()
    lowest = torch.tensor([float("-inf")])
    thresholds = torch.cat([lowest, fired[places].float()])
    thresholds = torch.nextafter(
        thresholds, lowest
    ).double()  # the neuron itself is above, also in the kernels' float32
    named = torch.stack([_num_above(each.flatten(), thresholds) for each in logits]).sum(0)
    return Curve(thresholds, _num_above(fired, thresholds).double(), named.double(), float(len(fired)), values)


def _num_above(values: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """values: float32 [n]; thresholds: float64 [B], ascending -> int64 [B], how many values are above each."""
    above = torch.full(thresholds.shape, len(values))
    for chunk in torch.split(values, CHUNK):
        above -= torch.searchsorted(chunk.double().sort().values, thresholds, right=True)
    return above


def spend(curves: Sequence[Curve], recall: float, least_recall: float = 0.0) -> list[int]:
    """For each layer the index of its threshold, so that all layers together reach the recall and name least.

    least_recall: what every layer has to reach by itself.
    """
    fired = sum(each.fired for each in curves)
    floors = [each.for_recall(least_recall) if least_recall else len(each.thresholds) - 1 for each in curves]

    def chosen(price: float) -> list[int]:
        return [min(each.cheapest(price), floor) for each, floor in zip(curves, floors, strict=True)]

    low, high = 0.0, 1.0
    while _found(curves, chosen(high)) < recall * fired and high < 1e12:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if _found(curves, chosen(middle)) < recall * fired:
            low = middle
        else:
            high = middle
    return chosen(high)


def _found(curves: Sequence[Curve], chosen: Sequence[int]) -> float:
    return sum(float(each.found[idx]) for each, idx in zip(curves, chosen, strict=True))
