"""A placement made better by exchanging a few groups, its merge points kept.

Filling memory in one order leaves two kinds of loss, and each has its exchange. Whole groups leave room: a group goes
to a faster tier and another, of any layer, comes back for it. And a layer's time is its slower side's: inside a layer
up to three groups change sides so that both take nearly as long.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from hybrid_runtime.placement.problem import (
    LayerGroups,
    LayerPlacement,
    Placement,
    PlacementProblem,
    Tier,
    count_hot,
    load,
    place_layer,
)

LEAST_GAIN: Final = 1e-6  # of the time: smaller steps cost more here than they can be worth
FASTER_AND_SLOWER: Final[tuple[tuple[Tier, Tier], ...]] = (("gpu", "ram"), ("gpu", "disk"), ("ram", "disk"))


@dataclass(frozen=True, slots=True)
class _Moves:
    """Groups that may go from one tier to another, and what each changes. The last is none of them: nothing moves.

    layer: position of its layer in the problem, -1 for the last; all fields are [num_moves].
    """

    layer: npt.NDArray[np.int64]
    group: npt.NDArray[np.int64]
    more_s: npt.NDArray[np.float64]
    more_gpu_bytes: npt.NDArray[np.int64]
    more_ram_bytes: npt.NDArray[np.int64]


def exchanged(problem: PlacementProblem, placement: Placement) -> Placement:
    """The placement after all exchanges that help. It stands if the one before did, and is never slower."""
    return _balanced(problem, _repacked(problem, _balanced(problem, placement)))


def _repacked(problem: PlacementProblem, placement: Placement) -> Placement:
    """Groups of two layers exchanged between two tiers, the best exchange first, until none helps."""
    while True:
        trades = [_best_trade(problem, placement, faster, slower) for faster, slower in FASTER_AND_SLOWER]
        more_s, changes = min(trades, key=lambda trade: trade[0])
        if not more_s < -LEAST_GAIN * placement.objective_s:
            return placement
        layers = list(placement.layers)
        for position, group_idx, tier in changes:
            tiers = list(layers[position].tiers)
            tiers[group_idx] = tier
            layers[position] = place_layer(problem.layers[position], layers[position].merge, tiers)
        placement = replace(placement, layers=tuple(layers))


def _best_trade(
    problem: PlacementProblem, placement: Placement, faster: Tier, slower: Tier
) -> tuple[float, list[tuple[int, int, Tier]]]:
    """What the best exchange between two tiers adds to the time, and the new tiers as (layer, group, tier)."""
    up, down = _moves(problem, placement, slower, faster), _moves(problem, placement, faster, slower)
    more_s = up.more_s[:, None] + down.more_s  # [up, down]
    gpu_room, ram_room = problem.gpu_bytes - placement.gpu_bytes, problem.ram_bytes - placement.ram_bytes
    fits = up.more_gpu_bytes[:, None] + down.more_gpu_bytes <= gpu_room
    fits &= up.more_ram_bytes[:, None] + down.more_ram_bytes <= ram_room
    fits &= up.layer[:, None] != down.layer  # in one layer the two changes do not add up
    more_s[~fits] = np.inf
    best_up, best_down = np.unravel_index(np.argmin(more_s), more_s.shape)
    ends: tuple[tuple[_Moves, np.intp, Tier], ...] = ((up, best_up, faster), (down, best_down, slower))
    changes = [(int(moves.layer[i]), int(moves.group[i]), tier) for moves, i, tier in ends if moves.layer[i] >= 0]
    return float(more_s[best_up, best_down]), changes


def _moves(problem: PlacementProblem, placement: Placement, source: Tier, target: Tier) -> _Moves:
    """All groups in source whose layers may have them in target."""
    moves: list[tuple[int, int, float, int, int]] = []
    for position, (layer, placed) in enumerate(zip(problem.layers, placement.layers, strict=True)):
        if source not in placed.tiers or target not in problem.tiers(placed.merge):
            continue
        before, after = load(layer, placed.merge, source), load(layer, placed.merge, target)
        cpu_s, gpu_s = after.cpu_s - before.cpu_s, after.gpu_s - before.gpu_s
        gpu_bytes, ram_bytes = after.gpu_bytes - before.gpu_bytes, after.ram_bytes - before.ram_bytes
        spare = count_hot(layer, placed.tiers) - max(1, problem.min_hot) if source == "gpu" else layer.num_neurons
        now_s = placed.total_s - placed.sync_s
        for group_idx, (group, tier) in enumerate(zip(layer.groups, placed.tiers, strict=True)):
            if tier == source and group.num_neurons <= spare:
                later_s = max(placed.cpu_s + group.active * cpu_s, placed.gpu_s + group.active * gpu_s)
                size = group.num_neurons
                moves.append((position, group_idx, later_s - now_s, size * gpu_bytes, size * ram_bytes))
    layers, groups, more_s, more_gpu_bytes, more_ram_bytes = zip(*moves, (-1, -1, 0.0, 0, 0), strict=True)
    return _Moves(
        np.array(layers), np.array(groups), np.array(more_s), np.array(more_gpu_bytes), np.array(more_ram_bytes)
    )


def _balanced(problem: PlacementProblem, placement: Placement) -> Placement:
    """Both sides of every layer made to take more nearly the same time, by exchanges between VRAM and RAM."""
    gpu_room, ram_room = problem.gpu_bytes - placement.gpu_bytes, problem.ram_bytes - placement.ram_bytes
    layers = list(placement.layers)
    for position, layer in enumerate(problem.layers):
        while layers[position].merge != "none":
            better = _balanced_once(problem, layer, layers[position], gpu_room, ram_room)
            if better is None:
                break
            gpu_room += layers[position].gpu_bytes - better.gpu_bytes
            ram_room += layers[position].ram_bytes - better.ram_bytes
            layers[position] = better
    return replace(placement, layers=tuple(layers))


def _balanced_once(
    problem: PlacementProblem, layer: LayerGroups, placed: LayerPlacement, gpu_room: int, ram_room: int
) -> LayerPlacement | None:
    """The layer after the one exchange that shortens it most, of at most a hot group and two in RAM, or None."""
    hot, cold = load(layer, placed.merge, "gpu"), load(layer, placed.merge, "ram")
    leaving, entering = _subsets(placed.tiers, "gpu", 1), _subsets(placed.tiers, "ram", 2)
    active = np.array([*(group.active for group in layer.groups), 0.0])
    sizes = np.array([*(group.num_neurons for group in layer.groups), 0])
    more_active = active[entering].sum(1) - active[leaving].sum(1)[:, None]  # [leaving, entering]: more on the GPU
    more_hot = sizes[entering].sum(1) - sizes[leaving].sum(1)[:, None]
    total_s = placed.sync_s + np.maximum(
        placed.cpu_s + more_active * (hot.cpu_s - cold.cpu_s), placed.gpu_s + more_active * (hot.gpu_s - cold.gpu_s)
    )
    fits = more_hot * (hot.gpu_bytes - cold.gpu_bytes) <= gpu_room
    fits &= more_hot * (hot.ram_bytes - cold.ram_bytes) <= ram_room
    fits &= count_hot(layer, placed.tiers) + more_hot >= max(1, problem.min_hot)
    total_s[~fits] = np.inf
    best = np.unravel_index(np.argmin(total_s), total_s.shape)
    if not total_s[best] < placed.total_s * (1 - LEAST_GAIN):
        return None
    left, entered = set(leaving[best[0]].tolist()), set(entering[best[1]].tolist())
    tiers: list[Tier] = []
    for group_idx, tier in enumerate(placed.tiers):
        tiers.append("ram" if group_idx in left else "gpu" if group_idx in entered else tier)
    return place_layer(layer, placed.merge, tiers)


def _subsets(tiers: Sequence[Tier], tier: Tier, size: int) -> npt.NDArray[np.int64]:
    """[num_subsets, size]: up to size groups of a tier; len(tiers), which is no group, fills the places left."""
    nothing = len(tiers)
    members = [group_idx for group_idx, each in enumerate(tiers) if each == tier]
    return np.array(list(itertools.combinations([*members, *[nothing] * size], size)))
