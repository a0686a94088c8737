"""Neurons placed by benefit per byte: quick, usually near the best, and no proof of it.

What saves most time per byte goes to VRAM and what is left to RAM, until nothing fits. Then layers that do not earn
their sync give their VRAM to the others, layers try whether to merge at `hidden`, and exchanges of a few groups mend
what the order of filling got wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hybrid_runtime.placement.exchanges import exchanged
from hybrid_runtime.placement.problem import (
    MergePoint,
    Placement,
    PlacementProblem,
    Tier,
    count_hot,
    load,
    place_layer,
    violations,
)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A group that may move from RAM to VRAM, and what the move takes. layer: its layer's position in the problem.

    gpu_bytes: more in VRAM; bundle_bytes: less in RAM; saved_s, added_s: less on the CPU and more on the GPU per token.
    """

    layer: int
    group: int
    gpu_bytes: int
    bundle_bytes: int
    saved_s: float
    added_s: float


def place_greedily(problem: PlacementProblem) -> Placement | None:
    """The best placement met on the way from hot groups in every layer to hot groups in few; None if none stands."""
    merges: list[MergePoint] = ["output"] * len(problem.layers)
    best: Placement | None = None
    while True:
        placement = _filled(problem, merges)
        is_better = best is None or placement.objective_s < best.objective_s
        if is_better and not violations(problem, placement):
            best = placement
        gains = [(_gain_s(problem, placement, i), i) for i, merge in enumerate(merges) if merge == "output"]
        if not gains or (min(gains)[0] > 0 and not is_better):
            break
        merges[min(gains)[1]] = "none"
    if best is None:
        return None
    return _on_one_side(problem, exchanged(problem, _with_down_rows(problem, best)))


def _on_one_side(problem: PlacementProblem, placement: Placement) -> Placement:
    """The placement where layers whose neurons are all on the GPU merge nothing, if that is quicker."""
    layers = []
    for layer, placed in zip(problem.layers, placement.layers, strict=True):
        whole = place_layer(layer, "gpu", placed.tiers) if set(placed.tiers) == {"gpu"} else placed
        layers.append(min(placed, whole, key=lambda each: each.total_s))
    return Placement(tuple(layers))


def _with_down_rows(problem: PlacementProblem, best: Placement) -> Placement:
    """The best after layers in turn merged at `hidden`, first where that saves most per byte, while it helped."""
    benefits = []
    for position, layer in enumerate(problem.layers):
        saved_s = (layer.costs.cpu_s - layer.costs.cpu_without_down_s) * layer.active
        benefits.append((-saved_s / (layer.num_neurons * layer.down_bytes), position))
    for _, position in sorted(benefits):
        merges = [layer.merge for layer in best.layers]
        merges[position] = "hidden"
        placement = _filled(problem, merges)
        if placement.objective_s >= best.objective_s or violations(problem, placement):
            break
        best = placement
    return best


def _filled(problem: PlacementProblem, merges: Sequence[MergePoint]) -> Placement:
    """Every group in a tier, for layers that merge like this; one that got no hot group for `output` merges nowhere."""
    hot = _hot(problem, merges)
    tiers = _cold_tiers(problem, merges, hot)
    for each in hot:
        tiers[each.layer][each.group] = "gpu"
    layers = []
    for layer, merge, chosen in zip(problem.layers, merges, tiers, strict=True):
        layers.append(place_layer(layer, "none" if merge == "output" and "gpu" not in chosen else merge, chosen))
    return Placement(tuple(layers))


def _hot(problem: PlacementProblem, merges: Sequence[MergePoint]) -> set[_Candidate]:
    """Groups for VRAM: what saves most per byte while it shortens its layer, then what RAM cannot take of the others.

    The latter are those that fire least, since a layer which is as slow on the GPU as on the CPU gains by none.
    """
    pairs = zip(problem.layers, merges, strict=True)
    cold = [place_layer(layer, merge, ["ram"] * len(layer.groups)) for layer, merge in pairs]
    cpu_s, gpu_s = [each.cpu_s for each in cold], [each.gpu_s for each in cold]
    room = problem.gpu_bytes - sum(each.gpu_bytes for each in cold)
    excess = sum(each.ram_bytes for each in cold) - problem.ram_bytes
    ranked = sorted(_candidates(problem, merges), key=lambda each: -each.saved_s / each.gpu_bytes)
    hot: set[_Candidate] = set()
    for each in ranked:
        later_s = max(cpu_s[each.layer] - each.saved_s, gpu_s[each.layer] + each.added_s)
        if each.gpu_bytes <= room and later_s < max(cpu_s[each.layer], gpu_s[each.layer]):
            cpu_s[each.layer] -= each.saved_s
            gpu_s[each.layer] += each.added_s
            hot.add(each)
            room -= each.gpu_bytes
            excess -= each.bundle_bytes
    for each in reversed(ranked):
        if excess > 0 and each not in hot and each.gpu_bytes <= room:
            hot.add(each)
            room -= each.gpu_bytes
            excess -= each.bundle_bytes
    return hot


def _candidates(problem: PlacementProblem, merges: Sequence[MergePoint]) -> Iterator[_Candidate]:
    """The groups of all layers that merge."""
    for position, (layer, merge) in enumerate(zip(problem.layers, merges, strict=True)):
        if merge == "none":
            continue
        hot, cold = load(layer, merge, "gpu"), load(layer, merge, "ram")
        for group_idx, group in enumerate(layer.groups):
            yield _Candidate(
                layer=position,
                group=group_idx,
                gpu_bytes=group.num_neurons * (hot.gpu_bytes - cold.gpu_bytes),
                bundle_bytes=group.num_neurons * layer.bundle_bytes,
                saved_s=group.active * cold.cpu_s,
                added_s=group.active * (hot.gpu_s - cold.gpu_s),
            )


def _cold_tiers(problem: PlacementProblem, merges: Sequence[MergePoint], hot: set[_Candidate]) -> list[list[Tier]]:
    """RAM for all groups but the hot ones, as long as it has room; layers at `hidden` first, which allow no disk."""
    tiers: list[list[Tier]] = [["ram"] * len(layer.groups) for layer in problem.layers]
    if not problem.allow_disk:
        return tiers
    are_hot = {(each.layer, each.group) for each in hot}
    ranked = []
    for position, (layer, merge) in enumerate(zip(problem.layers, merges, strict=True)):
        for group_idx, group in enumerate(layer.groups):
            if (position, group_idx) not in are_hot:
                saved_s = group.active * layer.costs.disk_s / (group.num_neurons * layer.bundle_bytes)
                ranked.append((merge != "hidden", -saved_s, position, group_idx))
    room = problem.ram_bytes
    for _, _, position, group_idx in sorted(ranked):
        bundle_bytes = problem.layers[position].groups[group_idx].num_neurons * problem.layers[position].bundle_bytes
        if bundle_bytes <= room:
            room -= bundle_bytes
        else:
            tiers[position][group_idx] = "disk"
    return tiers


def _gain_s(problem: PlacementProblem, placement: Placement, position: int) -> float:
    """Seconds per token that a layer gains from its hot groups; 0 where it has too few of them."""
    layer, placed = problem.layers[position], placement.layers[position]
    if count_hot(layer, placed.tiers) < max(1, problem.min_hot):
        return 0.0
    cold = place_layer(layer, "none", ["ram" if tier == "gpu" else tier for tier in placed.tiers])
    return cold.total_s - placed.total_s
