"""Where everything but neurons goes: of a few ways the one that comes out best, and the room it leaves for neurons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import BudgetError
from hybrid_runtime.placement.greedy import place_greedily
from hybrid_runtime.placement.grouping import NeuronGroups
from hybrid_runtime.placement.parts import (
    GPU_KINDS,
    LAYER_KINDS,
    Device,
    Part,
    PartKind,
    PlacedPart,
    bytes_on,
    layers_on_gpu,
    place_parts,
)
from hybrid_runtime.placement.problem import LayerGroups, PlacementProblem, require_room
from hybrid_runtime.placement.requests import PlanRequest, TokenCosts
from hybrid_runtime.sizes import format_bytes
from hybrid_runtime.store.manifest import Manifest

HEAD: tuple[PartKind, ...] = ("head",)
CACHE_SHARE = 1 / 8  # of the RAM for neurons: those on disk that were read lately, where any are there


@dataclass(frozen=True, slots=True)
class Start:
    """Where everything but neurons is, and the neurons' problem that it and the cache of the disk's leave."""

    placed: list[PlacedPart]
    problem: PlacementProblem
    cache_bytes: int


def chosen_start(
    manifest: Manifest,
    parts: Sequence[Part],
    groups: Sequence[NeuronGroups],
    request: PlanRequest,
    costs: TokenCosts,
) -> Start:
    """What comes out best when neurons are placed greedily, of three ways to share VRAM between them and the rest.

    The rest on the GPU where that is faster; nothing of it; all of it, where RAM is short. Raises BudgetError for too
    little memory.
    """
    faster = [kind for kinds in (LAYER_KINDS, HEAD) if _is_faster(kinds, costs) for kind in kinds]
    starts: list[Start] = []
    first_error: BudgetError | None = None
    for kinds in dict.fromkeys((tuple(faster), (), GPU_KINDS) if request.vram_bytes else ((),)):
        placed, vram_left = place_parts(parts, request.vram_bytes, kinds)
        try:
            start = _start(manifest, placed, vram_left, groups, request, costs)
            require_room(start.problem)
        except BudgetError as error:
            first_error = first_error or error
            continue
        starts.append(start)
    if not starts:
        assert first_error is not None
        raise first_error
    return starts[0] if len(starts) == 1 else min(starts, key=lambda start: _greedy_s(start, costs))


def _is_faster(kinds: Sequence[PartKind], costs: TokenCosts) -> bool:
    """Whether the GPU takes less time for these together."""
    there = [kind for kind in kinds if kind in costs.cpu_s]
    return sum(costs.gpu_s.get(kind, math.inf) for kind in there) < sum(costs.cpu_s[kind] for kind in there)


def _greedy_s(start: Start, costs: TokenCosts) -> float:
    """Seconds of a token with neurons placed greedily; infinite where that finds no way."""
    greedy = place_greedily(start.problem)
    parts_s = sum(part_seconds(start.placed, costs).values())
    return math.inf if greedy is None else parts_s + greedy.objective_s


def _start(
    manifest: Manifest,
    placed: list[PlacedPart],
    vram_left: int,
    groups: Sequence[NeuronGroups],
    request: PlanRequest,
    costs: TokenCosts,
) -> Start:
    """The neurons' problem beside what is placed. Raises BudgetError where RAM does not even hold that."""
    dense = bytes_on(placed, "ram")
    ram_left = request.ram_bytes - request.program_bytes - request.reserved_bytes - dense
    if ram_left < 0:
        raise BudgetError(
            f"--ram {format_bytes(request.ram_bytes)}: the program takes "
            f"{format_bytes(request.program_bytes + request.reserved_bytes)} and "
            f"what is not neurons {format_bytes(dense)}, which is {-ram_left} bytes more; give more --ram, a smaller "
            "--ctx or --quant, or --vram that holds attention and head"
        )
    config, on_gpu = manifest.config, layers_on_gpu(placed)
    row = manifest.quantization.weights.row_bytes(config.hidden_size)
    bundle = row * (3 if config.activation.is_gated else 2)
    layers = tuple(
        LayerGroups(idx, each.groups, bundle, row, (costs.beside_gpu if idx in on_gpu else costs.beside_cpu)[idx])
        for idx, each in enumerate(groups)
    )
    neurons = sum(layer.num_neurons * bundle for layer in layers)
    if not request.allow_disk or neurons <= vram_left + ram_left:
        return Start(placed, PlacementProblem(layers, vram_left, ram_left, allow_disk=False), 0)
    least = least_cache_bytes(config, bundle)
    cache_bytes = max(least, int(CACHE_SHARE * ram_left) // bundle * bundle)
    if cache_bytes > ram_left:
        raise BudgetError(
            f"--ram {format_bytes(request.ram_bytes)}: reading neurons from disk takes a cache of "
            f"{format_bytes(cache_bytes)} at least, and only {format_bytes(ram_left)} are left for it, which is "
            f"{cache_bytes - ram_left} bytes too few; give more --ram, a smaller --ctx or --quant, or --vram that "
            "holds attention and head"
        )
    problem = PlacementProblem(layers, vram_left, ram_left - cache_bytes, allow_disk=True)
    return Start(placed, problem, cache_bytes)


def part_seconds(placed: Sequence[PlacedPart], costs: TokenCosts) -> dict[tuple[PartKind, Device], float]:
    """Of a token, by kind and device; a kind's seconds are shared out by bytes."""
    totals: dict[PartKind, int] = {}
    groups: dict[tuple[PartKind, Device], int] = {}
    for each in placed:
        kind, size = each.part.kind, each.part.num_bytes
        totals[kind] = totals.get(kind, 0) + size
        groups[kind, each.device] = groups.get((kind, each.device), 0) + size
    seconds: dict[Device, dict[PartKind, float]] = {"gpu": costs.gpu_s, "ram": costs.cpu_s}
    return {
        (kind, device): seconds[device].get(kind, 0.0) * size / max(1, totals[kind])
        for (kind, device), size in groups.items()
    }


def least_cache_bytes(config: ModelConfig, bundle_bytes: int) -> int:
    """What reading neurons from disk needs: all that one layer can ask for at once."""
    return (max(1, config.num_experts_per_tok) * config.intermediate_size + 1) * bundle_bytes
