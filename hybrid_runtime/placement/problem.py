"""Which neurons go where: the question, an answer, and what an answer costs.

A layer's neurons come in groups that move as a whole. Every group has one tier, every layer one merge point, and the
tokens' mean time is the sum over layers of what the slower side computes plus what the merge costs. Attention, caches
and buffers are the caller's: its budgets are what they leave. How an answer is found is told in greedy.py and exact.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Final, Literal

from hybrid_runtime.errors import BudgetError
from hybrid_runtime.sizes import format_bytes

Tier = Literal["gpu", "ram", "disk"]
MergePoint = Literal["none", "output", "hidden", "gpu"]

MERGE_POINTS: Final[tuple[MergePoint, ...]] = ("none", "output", "hidden", "gpu")
"""Where both sides' results meet: nowhere, since the CPU computes all neurons or (`gpu`) the GPU does; before the down
projection (`hidden`); after it (`output`).
"""


@dataclass(frozen=True, slots=True)
class Group:
    """Neurons of one layer that share a tier. active: how many of them fire per token, routing included."""

    num_neurons: int
    active: float

    def __post_init__(self) -> None:
        """Raise ValueError for a group of nothing, or one of which more fires than there is."""
        if self.num_neurons < 1:
            raise ValueError(f"num_neurons is {self.num_neurons}, expected at least 1")
        if not 0 <= self.active <= self.num_neurons * (1 + 1e-9):  # a sum of frequencies is rounded
            raise ValueError(f"active is {self.active}, expected 0 to num_neurons = {self.num_neurons}")


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """Seconds per active neuron, except the four syncs: seconds per token of a layer that merges there.

    cpu_s: a whole bundle on the CPU, from RAM; cpu_without_down_s: its gate and up rows only; disk_s: what the CPU
    waits more for a bundle on disk; gpu_s: a whole bundle on the GPU; gpu_down_s: its down row only. A sync has what
    the operations cost beyond their rows, and data's way to the other side and back; none_sync_s, all_gpu_sync_s: of a
    layer whose neurons are all on one side, which may not be the side that its attention is on.
    """

    cpu_s: float
    cpu_without_down_s: float
    disk_s: float
    gpu_s: float
    gpu_down_s: float
    sync_s: float
    hidden_sync_s: float
    none_sync_s: float
    all_gpu_sync_s: float

    def __post_init__(self) -> None:
        """Raise ValueError for a time that no machine takes."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{field.name} is {value}, expected a finite time >= 0")


@dataclass(frozen=True, slots=True)
class LayerGroups:
    """One layer's neurons. bundle_bytes: of one neuron; down_bytes: of its down row, which is part of them."""

    layer_idx: int
    groups: tuple[Group, ...]
    bundle_bytes: int
    down_bytes: int
    costs: LayerCosts

    def __post_init__(self) -> None:
        """Raise ValueError for a layer of nothing, and for down rows that are larger than their bundle."""
        if not self.groups:
            raise ValueError(f"layer {self.layer_idx} has no groups, expected at least one")
        if not 0 < self.down_bytes < self.bundle_bytes:
            raise ValueError(
                f"layer {self.layer_idx}: down_bytes is {self.down_bytes}, "
                f"expected 1 to bundle_bytes - 1 = {self.bundle_bytes - 1}"
            )

    @property
    def num_neurons(self) -> int:
        """Of all groups together."""
        return sum(group.num_neurons for group in self.groups)

    @property
    def active(self) -> float:
        """Neurons that fire per token."""
        return math.fsum(group.active for group in self.groups)


@dataclass(frozen=True, slots=True)
class PlacementProblem:
    """All layers, ascending by layer_idx, and the room for them.

    min_hot: neurons that a layer has on the GPU at least, if it merges at all.
    """

    layers: tuple[LayerGroups, ...]
    gpu_bytes: int
    ram_bytes: int
    allow_disk: bool
    min_hot: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for no layers, layers that are out of order, and amounts below 0."""
        if not self.layers:
            raise ValueError("layers are empty, expected at least one")
        order = [layer.layer_idx for layer in self.layers]
        if order != sorted(set(order)):
            raise ValueError(f"layers come as {order}, expected each once, ascending by layer_idx")
        for name in ("gpu_bytes", "ram_bytes", "min_hot"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")

    def tiers(self, merge: MergePoint) -> tuple[Tier, ...]:
        """Where a layer with this merge point may keep a group.

        `hidden` keeps none on disk: the GPU waits for all cold activations at once, so one late row stops the layer.
        """
        tiers: dict[MergePoint, tuple[Tier, ...]] = {
            "none": ("ram", "disk"),
            "output": ("gpu", "ram", "disk"),
            "hidden": ("gpu", "ram"),
            "gpu": ("gpu",),
        }
        return tuple(tier for tier in tiers[merge] if tier != "disk" or self.allow_disk)


@dataclass(frozen=True, slots=True)
class Load:
    """What a group takes: seconds per active neuron on either side, bytes per neuron in each tier."""

    cpu_s: float = 0.0
    gpu_s: float = 0.0
    gpu_bytes: int = 0
    ram_bytes: int = 0
    disk_bytes: int = 0


def load(layer: LayerGroups, merge: MergePoint, tier: Tier) -> Load:
    """What a group of this layer takes in a tier. Merged at `hidden`, the GPU has the cold groups' down rows too."""
    costs = layer.costs
    if tier == "gpu":
        return Load(gpu_s=costs.gpu_s, gpu_bytes=layer.bundle_bytes)
    if tier == "disk":
        return Load(cpu_s=costs.cpu_s + costs.disk_s, disk_bytes=layer.bundle_bytes)
    if merge == "hidden":
        return Load(
            cpu_s=costs.cpu_without_down_s,
            gpu_s=costs.gpu_down_s,
            gpu_bytes=layer.down_bytes,
            ram_bytes=layer.bundle_bytes,
        )
    return Load(cpu_s=costs.cpu_s, ram_bytes=layer.bundle_bytes)


def sync_s(layer: LayerGroups, merge: MergePoint) -> float:
    """Seconds per token that the merge adds to both sides' work."""
    costs = layer.costs
    syncs: dict[MergePoint, float] = {
        "none": costs.none_sync_s,
        "output": costs.sync_s,
        "hidden": costs.hidden_sync_s,
        "gpu": costs.all_gpu_sync_s,
    }
    return syncs[merge]


@dataclass(frozen=True, slots=True)
class LayerPlacement:
    """One layer's merge point and its groups' tiers, in the order of the groups; seconds and bytes are expected ones.

    cpu_s, gpu_s: work of either side per token, at the same time as the other's.
    """

    layer_idx: int
    merge: MergePoint
    tiers: tuple[Tier, ...]
    cpu_s: float
    gpu_s: float
    sync_s: float
    gpu_bytes: int
    ram_bytes: int
    disk_bytes: int

    @property
    def total_s(self) -> float:
        """Seconds per token."""
        return max(self.cpu_s, self.gpu_s) + self.sync_s


@dataclass(frozen=True, slots=True)
class Placement:
    """A tier for every group of every layer. objective_s: seconds per token of all layers."""

    layers: tuple[LayerPlacement, ...]

    @property
    def objective_s(self) -> float:
        """What a solver minimises."""
        return math.fsum(layer.total_s for layer in self.layers)

    @property
    def gpu_bytes(self) -> int:
        """In VRAM."""
        return sum(layer.gpu_bytes for layer in self.layers)

    @property
    def ram_bytes(self) -> int:
        """In RAM."""
        return sum(layer.ram_bytes for layer in self.layers)

    @property
    def disk_bytes(self) -> int:
        """On disk only."""
        return sum(layer.disk_bytes for layer in self.layers)


def place_layer(layer: LayerGroups, merge: MergePoint, tiers: Sequence[Tier]) -> LayerPlacement:
    """A layer whose group i is in tiers[i], with its times and bytes. The order of its groups changes none of them."""
    loads = [load(layer, merge, tier) for tier in tiers]
    pairs = list(zip(layer.groups, loads, strict=True))
    return LayerPlacement(
        layer_idx=layer.layer_idx,
        merge=merge,
        tiers=tuple(tiers),
        cpu_s=math.fsum(group.active * each.cpu_s for group, each in pairs),
        gpu_s=math.fsum(group.active * each.gpu_s for group, each in pairs),
        sync_s=sync_s(layer, merge),
        gpu_bytes=sum(group.num_neurons * each.gpu_bytes for group, each in pairs),
        ram_bytes=sum(group.num_neurons * each.ram_bytes for group, each in pairs),
        disk_bytes=sum(group.num_neurons * each.disk_bytes for group, each in pairs),
    )


def violations(problem: PlacementProblem, placement: Placement) -> list[str]:
    """The rules that a placement breaks, in words; none for a placement that stands."""
    return [*_room_violations(problem, placement), *_layer_violations(problem, placement)]


def _room_violations(problem: PlacementProblem, placement: Placement) -> Iterator[str]:
    if placement.gpu_bytes > problem.gpu_bytes:
        yield f"{placement.gpu_bytes} bytes in VRAM, {problem.gpu_bytes} available"
    if placement.ram_bytes > problem.ram_bytes:
        yield f"{placement.ram_bytes} bytes in RAM, {problem.ram_bytes} available"


def _layer_violations(problem: PlacementProblem, placement: Placement) -> Iterator[str]:
    for layer, placed in zip(problem.layers, placement.layers, strict=True):
        if placed.layer_idx != layer.layer_idx:
            yield f"layer {layer.layer_idx} has the placement of layer {placed.layer_idx}"
        for tier in sorted(set(placed.tiers) - set(problem.tiers(placed.merge))):
            yield f"layer {layer.layer_idx} merges at {placed.merge}, which allows no group in tier {tier}"
        num_hot = count_hot(layer, placed.tiers)
        if placed.merge != "none" and num_hot < problem.min_hot:
            yield f"layer {layer.layer_idx} has {num_hot} hot neurons, expected at least min_hot = {problem.min_hot}"


def count_hot(layer: LayerGroups, tiers: Sequence[Tier]) -> int:
    """Neurons on the GPU."""
    return sum(group.num_neurons for group, tier in zip(layer.groups, tiers, strict=True) if tier == "gpu")


def require_room(problem: PlacementProblem) -> None:
    """Raise BudgetError when VRAM and RAM together cannot hold the neurons and there is no disk for the rest."""
    needed = sum(layer.num_neurons * layer.bundle_bytes for layer in problem.layers)
    available = problem.gpu_bytes + problem.ram_bytes
    if needed > available and not problem.allow_disk:
        raise BudgetError(f"the neurons need {_in_full(needed)}, VRAM leaves {_in_full(problem.gpu_bytes)} and RAM "
                          f"{_in_full(problem.ram_bytes)} for them: {_in_full(available)}, which is "
                          f"{needed - available} bytes too few; give more --vram or --ram, allow the disk, or use a "
                          "smaller --quant")  # fmt: skip


def no_placement(problem: PlacementProblem) -> BudgetError:
    """The refusal where the bytes would suffice, but whole groups and min_hot cannot be made to fit them."""
    needed = sum(layer.num_neurons * layer.bundle_bytes for layer in problem.layers)
    return BudgetError(f"the neurons need {_in_full(needed)}, which do not split into {_in_full(problem.gpu_bytes)} of "
                       f"VRAM and {_in_full(problem.ram_bytes)} of RAM, since groups stay whole and a layer that uses "
                       f"the GPU has at least {problem.min_hot} neurons there; give more --vram or --ram, or allow "
                       "the disk")  # fmt: skip


def _in_full(num_bytes: int) -> str:
    """In units that people read, and to the byte: a budget may be one byte short."""
    return f"{format_bytes(num_bytes)} ({num_bytes} bytes)" if num_bytes >= 1024 else f"{num_bytes} bytes"
