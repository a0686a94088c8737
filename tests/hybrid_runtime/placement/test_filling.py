"""RAM that is free holds what would lie on disk, what fires most first."""

from hybrid_runtime.placement.filling import fill_free_ram
from hybrid_runtime.placement.problem import (
    Group,
    LayerCosts,
    LayerGroups,
    Placement,
    PlacementProblem,
    place_layer,
    violations,
)

COSTS = LayerCosts(*(1e-6,) * 9)


def filled(ram_bytes, tiers):
    """Three groups of ten neurons of 30 bytes, of which 5, 0 and 2 fire; those tiers in each of two layers."""
    groups = (Group(10, 5.0), Group(10, 0.0), Group(10, 2.0))
    layers = tuple(LayerGroups(idx, groups, 30, 10, COSTS) for idx in range(2))
    problem = PlacementProblem(layers, 0, ram_bytes, allow_disk=True)
    before = Placement(tuple(place_layer(layer, "none", tiers) for layer in layers))
    after = fill_free_ram(problem, before)
    assert not violations(problem, after)
    assert after.objective_s <= before.objective_s
    return [layer.tiers for layer in after.layers]


def test_what_fires_most_comes_first_and_what_never_fired_comes_too():
    disk = ("disk",) * 3
    assert filled(0, disk) == [disk, disk]
    assert filled(300, disk) == [("ram", "disk", "disk"), disk]
    assert filled(1200, disk) == [("ram", "disk", "ram")] * 2
    assert filled(1500, disk) == [("ram", "ram", "ram"), ("ram", "disk", "ram")]
    assert filled(1800, disk) == [("ram",) * 3] * 2


def test_what_is_full_stays_as_it_is():
    assert filled(1499, ("ram", "disk", "ram")) == [("ram", "disk", "ram")] * 2
