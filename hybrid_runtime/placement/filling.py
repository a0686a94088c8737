"""RAM that a placement leaves free, given to neurons that it left on disk.

What never fired while a profile was made costs a solver nothing on disk; it may fire all the same.
"""

from __future__ import annotations

from hybrid_runtime.placement.problem import Placement, PlacementProblem, Tier, place_layer


def fill_free_ram(problem: PlacementProblem, placement: Placement) -> Placement:
    """The same with groups from disk in RAM as long as any fits, those that fire most first. It is never slower."""
    room = problem.ram_bytes - placement.ram_bytes
    on_disk = [
        (-group.active / group.num_neurons, position, idx)
        for position, (layer, placed) in enumerate(zip(problem.layers, placement.layers, strict=True))
        for idx, (group, tier) in enumerate(zip(layer.groups, placed.tiers, strict=True))
        if tier == "disk"
    ]
    tiers: dict[int, list[Tier]] = {}
    for _, position, idx in sorted(on_disk):
        layer = problem.layers[position]
        size = layer.groups[idx].num_neurons * layer.bundle_bytes
        if size <= room:
            room -= size
            tiers.setdefault(position, list(placement.layers[position].tiers))[idx] = "ram"
    return Placement(
        tuple(
            place_layer(layer, placed.merge, tiers[position]) if position in tiers else placed
            for position, (layer, placed) in enumerate(zip(problem.layers, placement.layers, strict=True))
        )
    )
