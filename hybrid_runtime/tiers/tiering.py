"""How a model's neurons are spread over tiers, as its program needs to know it."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_runtime.placement.plan import Plan
from hybrid_runtime.placement.problem import MergePoint
from hybrid_runtime.tiers.disk_cache import DiskCache


@dataclass(frozen=True, slots=True)
class Tiering:
    """plan: what is where. cache: of what is on disk. gpu_bytes: that the weights take in the GPU's memory."""

    plan: Plan
    cache: DiskCache
    gpu_bytes: int

    @property
    def merges(self) -> tuple[MergePoint, ...]:
        """By layer, where both sides' results meet."""
        return tuple(layer.merge for layer in self.plan.layers)
