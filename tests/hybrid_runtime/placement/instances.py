"""Placement problems for the tests, and the same answer the slow way: every tier and merge point tried."""

from __future__ import annotations

import itertools

import numpy as np

from hybrid_runtime.placement.problem import Group, LayerCosts, LayerGroups, PlacementProblem

COSTS = LayerCosts(
    cpu_s=0.35e-6,
    cpu_without_down_s=0.23e-6,
    disk_s=3.5e-6,
    gpu_s=14e-9,
    gpu_down_s=5e-9,
    sync_s=40e-6,
    hidden_sync_s=50e-6,
    none_sync_s=8e-6,
    all_gpu_sync_s=12e-6,
)


def layer_of(groups, layer_idx=0, bundle_bytes=6912, down_bytes=2304, costs=COSTS):
    return LayerGroups(layer_idx, tuple(Group(*group) for group in groups), bundle_bytes, down_bytes, costs)


def random_problem(seed, shape=None):
    """Mixed small problems: tight and loose, with and without disk and min_hot, dear and cheap merges, equal groups."""
    rng = np.random.default_rng(seed)
    num_layers, num_groups = shape or [(2, 3), (3, 2), (1, 4), (2, 2)][seed % 4]
    layers = tuple(random_layer(rng, layer_idx, num_groups) for layer_idx in range(num_layers))
    total = sum(layer.num_neurons * layer.bundle_bytes for layer in layers)
    gpu_bytes = int(total * rng.choice([0, rng.random() * 0.5, rng.random() * 1.3]))
    ram_bytes = int((total - gpu_bytes) * rng.uniform(0.9, 1.5)) if rng.random() < 0.6 else int(total * rng.random())
    return PlacementProblem(
        layers=layers,
        gpu_bytes=gpu_bytes,
        ram_bytes=max(0, ram_bytes),
        allow_disk=bool(rng.random() < 0.5),
        min_hot=int(rng.choice([0, 0, rng.integers(1, 12)])),
    )


def random_layer(rng, layer_idx, num_groups):
    sizes = rng.integers(1, 9, num_groups)
    groups = [(int(size), float(size * rng.random() * rng.choice([0.0, 0.1, 1.0]))) for size in sizes]
    if rng.random() < 0.3:
        groups[-1] = groups[0]
    cpu_s, bundle_bytes = rng.uniform(0.5, 2), int(rng.integers(3, 30))
    sync_s = float(rng.choice([0.0, rng.uniform(0, 3)]))
    costs = LayerCosts(
        cpu_s=cpu_s,
        cpu_without_down_s=cpu_s * rng.uniform(0.1, 1),
        disk_s=rng.uniform(0, 5),
        gpu_s=float(rng.choice([0.0, rng.uniform(0, 0.2), rng.uniform(0, 3)])),
        gpu_down_s=float(rng.choice([0.0, rng.uniform(0, 0.1), rng.uniform(0, 1)])),
        sync_s=sync_s,
        hidden_sync_s=float(rng.choice([0.0, rng.uniform(0, 3)])),
        none_sync_s=sync_s * float(rng.choice([0.0, rng.random()])),  # as much as where both sides work, or less
        all_gpu_sync_s=sync_s * float(rng.choice([0.0, rng.random()])),
    )
    return layer_of(groups, layer_idx, bundle_bytes, int(rng.integers(1, bundle_bytes)), costs)


def best_objective_s(problem):
    """The least time per token of all placements, None where none fits."""
    total = np.zeros((1, 3))
    for layer in problem.layers:
        choices = np.array(list(layer_choices(problem, layer)))
        total = (total[:, None] + choices[None]).reshape(-1, 3)
        total = total[(total[:, 1] <= problem.gpu_bytes) & (total[:, 2] <= problem.ram_bytes)]
    return float(total[:, 0].min()) if len(total) else None


def layer_choices(problem, layer):
    """Seconds, VRAM bytes and RAM bytes of everything that one layer may do."""
    for tiers in itertools.product(("gpu", "ram", "disk"), repeat=len(layer.groups)):
        active, neurons = dict.fromkeys(("gpu", "ram", "disk"), 0.0), dict.fromkeys(("gpu", "ram", "disk"), 0)
        for tier, group in zip(tiers, layer.groups, strict=True):
            active[tier] += group.active
            neurons[tier] += group.num_neurons
        if neurons["disk"] and not problem.allow_disk:
            continue
        costs = layer.costs
        gpu_bytes, ram_bytes = neurons["gpu"] * layer.bundle_bytes, neurons["ram"] * layer.bundle_bytes
        cpu_s = (active["ram"] + active["disk"]) * costs.cpu_s + active["disk"] * costs.disk_s
        gpu_s = active["gpu"] * costs.gpu_s
        if not neurons["gpu"]:
            yield cpu_s + costs.none_sync_s, gpu_bytes, ram_bytes
        if neurons["gpu"] == layer.num_neurons >= problem.min_hot:
            yield gpu_s + costs.all_gpu_sync_s, gpu_bytes, ram_bytes
        if neurons["gpu"] >= problem.min_hot:
            yield max(cpu_s, gpu_s) + costs.sync_s, gpu_bytes, ram_bytes
            if not neurons["disk"]:
                cpu_s = active["ram"] * costs.cpu_without_down_s
                gpu_s += active["ram"] * costs.gpu_down_s
                down_bytes = neurons["ram"] * layer.down_bytes
                yield max(cpu_s, gpu_s) + costs.hidden_sync_s, gpu_bytes + down_bytes, ram_bytes
