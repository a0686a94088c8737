"""Models spread over tiers at random: any neuron anywhere, any merge point, also what no planner would choose."""

from __future__ import annotations

import random

import torch

from hybrid_kernels.tiers.layout import DISK, GPU, RAM
from hybrid_runtime.model.weights import DecoderWeights, tiered_weights
from hybrid_runtime.placement.parts import model_parts
from hybrid_runtime.placement.plan import FORMAT_NAME, FORMAT_VERSION, Plan, PlanLayer, PlanPart
from hybrid_runtime.tiers.disk_cache import DiskCache
from hybrid_runtime.tiers.load import load_tiered
from hybrid_runtime.tiers.tiering import Tiering

MERGES = ("none", "output", "hidden", "gpu")
ALLOWED = {"none": (RAM, DISK), "output": (GPU, RAM, DISK), "hidden": (GPU, RAM), "gpu": (GPU,)}


def random_tiers(manifest, seed, merges=MERGES):
    """Merge points and uint8 [E, I], by layer."""
    chance, config = random.Random(seed), manifest.config
    shape = (max(1, config.num_experts), config.intermediate_size)
    generator = torch.Generator().manual_seed(seed)
    points, tiers = [], []
    for _ in range(config.num_hidden_layers):
        merge = chance.choice(merges)
        allowed = torch.tensor(ALLOWED[merge], dtype=torch.uint8)
        points.append(merge)
        tiers.append(allowed[torch.randint(len(allowed), shape, generator=generator)])
    return points, tiers


def plan_of(
    manifest, merges, tiers, *, num_positions=64, cache_bytes=0, led=frozenset(), gpu_parts=frozenset()
) -> Plan:
    """What a planner would write of such a placement, without times. led: layers of which everything is on the GPU;
    gpu_parts: what else is there.
    """
    config, row = manifest.config, manifest.quantization.weights.row_bytes(manifest.config.hidden_size)
    bundle = row * (3 if config.activation.is_gated else 2)
    layers = []
    for idx, (merge, of_layer) in enumerate(zip(merges, tiers, strict=True)):
        counts = [int((of_layer == tier).sum()) for tier in (GPU, RAM, DISK)]
        downs = counts[1] * row if merge == "hidden" else 0
        sizes = (counts[0] * bundle + downs, counts[1] * bundle, counts[2] * bundle)
        layers.append(PlanLayer(idx, merge, *counts, *sizes, 0.0, 0.0, 0.0))
    by_place = {}
    for part in model_parts(manifest, num_positions, "f32", None):
        place = (part.kind, "gpu" if part.layer_idx in led or part.kind in gpu_parts else "ram")
        by_place.setdefault(place, []).append(part)
    parts = tuple(
        PlanPart(
            *place,
            sum(part.num_bytes for part in some),
            0.0,
            tuple(part.layer_idx for part in some if part.layer_idx is not None),
        )
        for place, some in by_place.items()
    )
    totals = [sum(getattr(layer, f"{tier}_bytes") for layer in layers) for tier in ("gpu", "ram", "disk")]
    return Plan(
        FORMAT_NAME, FORMAT_VERSION, manifest.model, "0" * 64, 1, "simulated", 0, 0, num_positions, 1.0, "f32",
        *totals, cache_bytes, parts, tuple(layers), "none", 0.0, 0.0, None,
    )  # fmt: skip


def spread(store, seed, *, merges=MERGES, spare_slots=1, asynchronous=True, points_and_tiers=None) -> DecoderWeights:
    """A store's weights, spread over tiers. spare_slots: of the cache, beyond what one layer can ask for."""
    manifest = store.manifest
    config = manifest.config
    points, tiers = points_and_tiers or random_tiers(manifest, seed, merges)
    plan = plan_of(manifest, points, tiers)
    loaded = load_tiered(store, plan, tiers)
    most = max(1, config.num_experts_per_tok) * config.intermediate_size
    cache = DiskCache(most + spare_slots, loaded.networks[0][0].bundle_bytes, most, asynchronous=asynchronous)
    return tiered_weights(config, loaded, Tiering(plan, cache, loaded.gpu_bytes))
