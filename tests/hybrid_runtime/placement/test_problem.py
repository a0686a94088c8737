"""What a placement costs, which rules it breaks, and which problems make no sense."""

import math
from dataclasses import replace

import pytest

from hybrid_runtime.errors import BudgetError
from hybrid_runtime.placement.problem import (
    Group,
    LayerCosts,
    Placement,
    PlacementProblem,
    place_layer,
    require_room,
    violations,
)

from .instances import COSTS, layer_of

UNITS = LayerCosts(10, 7, 100, 2, 1, sync_s=0.5, hidden_sync_s=0.25, none_sync_s=0.125, all_gpu_sync_s=0.0625)
LAYER = layer_of([(4, 2.0), (8, 3.0), (16, 1.0)], bundle_bytes=10, down_bytes=3, costs=UNITS)
PROBLEM = PlacementProblem((LAYER,), gpu_bytes=136, ram_bytes=240, allow_disk=True)


@pytest.mark.parametrize(
    ("merge", "tiers", "cpu_s", "gpu_s", "sync_s", "gpu_bytes", "ram_bytes", "disk_bytes"),
    [
        ("none", ("ram", "ram", "disk"), 20 + 30 + 110, 0, 0.125, 0, 120, 160),
        ("gpu", ("gpu", "gpu", "gpu"), 0, 12, 0.0625, 280, 0, 0),
        ("output", ("gpu", "ram", "disk"), 30 + 110, 4, 0.5, 40, 80, 160),
        ("output", ("gpu", "gpu", "gpu"), 0, 12, 0.5, 280, 0, 0),
        ("hidden", ("gpu", "ram", "ram"), 21 + 7, 4 + 3 + 1, 0.25, 40 + 24 + 48, 240, 0),
        ("hidden", ("ram", "ram", "ram"), 42, 6, 0.25, 84, 280, 0),
    ],
    ids=["none", "gpu", "output", "output-all-hot", "hidden", "hidden-all-cold"],
)
def test_layer_costs_what_its_tiers_cost(merge, tiers, cpu_s, gpu_s, sync_s, gpu_bytes, ram_bytes, disk_bytes):
    placed = place_layer(LAYER, merge, tiers)
    assert (placed.cpu_s, placed.gpu_s, placed.sync_s) == (cpu_s, gpu_s, sync_s)
    assert (placed.gpu_bytes, placed.ram_bytes, placed.disk_bytes) == (gpu_bytes, ram_bytes, disk_bytes)
    assert placed.total_s == max(cpu_s, gpu_s) + sync_s


def test_placement_adds_up_its_layers():
    placed = place_layer(LAYER, "output", ("gpu", "ram", "disk"))
    placement = Placement((placed, replace(placed, layer_idx=1)))
    assert placement.objective_s == 2 * placed.total_s
    assert (placement.gpu_bytes, placement.ram_bytes, placement.disk_bytes) == (80, 160, 320)


@pytest.mark.parametrize(
    ("changes", "merge", "tiers", "expected"),
    [
        ({}, "output", ("gpu", "gpu", "disk"), []),
        ({"gpu_bytes": 119}, "output", ("gpu", "gpu", "disk"), ["120 bytes in VRAM, 119 available"]),
        ({"ram_bytes": 159}, "output", ("gpu", "disk", "ram"), ["160 bytes in RAM, 159 available"]),
        ({}, "none", ("gpu", "ram", "ram"), ["layer 0 merges at none, which allows no group in tier gpu"]),
        ({"gpu_bytes": 280}, "gpu", ("gpu", "gpu", "gpu"), []),
        ({}, "gpu", ("gpu", "gpu", "ram"), ["layer 0 merges at gpu, which allows no group in tier ram"]),
        ({}, "hidden", ("gpu", "ram", "disk"), ["layer 0 merges at hidden, which allows no group in tier disk"]),
        (
            {"allow_disk": False},
            "output",
            ("gpu", "ram", "disk"),
            ["layer 0 merges at output, which allows no group in tier disk"],
        ),
        (
            {"min_hot": 5},
            "output",
            ("gpu", "ram", "disk"),
            ["layer 0 has 4 hot neurons, expected at least min_hot = 5"],
        ),
        ({"min_hot": 5}, "none", ("ram", "ram", "disk"), []),
    ],
    ids=[
        "sound",
        "vram",
        "ram",
        "hot-unmerged",
        "all-hot",
        "cold-unmerged",
        "hidden-disk",
        "no-disk",
        "few-hot",
        "none-hot",
    ],
)
def test_broken_rules_are_named(changes, merge, tiers, expected):
    assert violations(replace(PROBLEM, **changes), Placement((place_layer(LAYER, merge, tiers),))) == expected


def test_placement_of_another_layer_is_named():
    placed = replace(place_layer(LAYER, "none", ("ram", "ram", "disk")), layer_idx=7)
    assert violations(PROBLEM, Placement((placed,))) == ["layer 0 has the placement of layer 7"]


def test_room_is_required_to_the_byte_unless_there_is_a_disk():
    require_room(replace(PROBLEM, gpu_bytes=40, ram_bytes=240, allow_disk=False))
    require_room(replace(PROBLEM, gpu_bytes=0, ram_bytes=0))
    with pytest.raises(BudgetError, match=r"need 280 bytes, VRAM leaves 40 bytes and RAM 239 bytes .* 1 bytes too few"):
        require_room(replace(PROBLEM, gpu_bytes=40, ram_bytes=239, allow_disk=False))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Group(0, 0.0), "num_neurons is 0"),
        (lambda: Group(2, 2.1), "active is 2.1"),
        (lambda: Group(2, -0.1), "active is -0.1"),
        (lambda: Group(2, math.nan), "active is nan"),
        (lambda: replace(COSTS, gpu_s=-1e-9), "gpu_s is -1e-09"),
        (lambda: replace(COSTS, sync_s=math.inf), "sync_s is inf"),
        (lambda: layer_of([(1, 1.0)], bundle_bytes=8, down_bytes=8), "down_bytes is 8, expected 1 to .* 7"),
        (lambda: layer_of([]), "layer 0 has no groups"),
        (lambda: replace(PROBLEM, layers=()), "layers are empty"),
        (lambda: replace(PROBLEM, layers=(replace(LAYER, layer_idx=1), LAYER)), r"layers come as \[1, 0\]"),
        (lambda: replace(PROBLEM, layers=(LAYER, LAYER)), r"layers come as \[0, 0\]"),
        (lambda: replace(PROBLEM, gpu_bytes=-1), "gpu_bytes is -1"),
        (lambda: replace(PROBLEM, min_hot=-1), "min_hot is -1"),
    ],
)
def test_nonsense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
