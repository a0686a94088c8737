"""A placement plan: which part and which neuron is in which tier, under which budgets, with what it should come to.

plan.json              everything but the neurons; written last
tiers.safetensors      layers.<l>: uint8 [E, I], 0 gpu, 1 ram, 2 disk
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import BudgetError, CheckpointError
from hybrid_runtime.model.kv_cache import KvDtype
from hybrid_runtime.placement.exact import place_exactly
from hybrid_runtime.placement.greedy import place_greedily
from hybrid_runtime.placement.grouping import NeuronGroups, group_neurons
from hybrid_runtime.placement.parts import (
    GPU_KINDS,
    GPU_OVERHEAD_BYTES,
    Device,
    Part,
    PartKind,
    PlacedPart,
    bytes_on,
    layers_on_gpu,
    model_parts,
    place_parts,
)
from hybrid_runtime.placement.problem import (
    LayerCosts,
    LayerGroups,
    LayerPlacement,
    MergePoint,
    PlacementProblem,
    require_room,
)
from hybrid_runtime.profiling.profile import Profile
from hybrid_runtime.sizes import format_bytes
from hybrid_runtime.store.manifest import Manifest
from hybrid_runtime.strict_json import parse_json_object
from hybrid_runtime.tensor_files import read_tensors, write_tensors
from hybrid_runtime.typed_json import from_json
from hybrid_runtime.whole_files import write_whole

FORMAT_NAME = "hybrid-runtime plan"
FORMAT_VERSION = 3
PLAN, TIERS = "plan.json", "tiers.safetensors"
REMEDY = "run hybrid-place again"
TIER_CODES = {"gpu": 0, "ram": 1, "disk": 2}
CACHE_SHARE = 1 / 8  # of the RAM for neurons: those on disk that were read lately, where any are there


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """Budgets in bytes, and what decides what else needs room. program_bytes: of RAM, what Python, torch and buffers
    are expected to take; reserved_bytes: what they may take more, which stays free.
    """

    vram_bytes: int
    ram_bytes: int
    num_positions: int
    kv_dtype: KvDtype
    program_bytes: int
    allow_disk: bool
    reserved_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TokenCosts:
    """Seconds of a token: of what is not neurons, on the CPU and on the GPU, by kind of part; and by layer of neurons,
    with its attention on the CPU, and on the GPU. mean_length: tokens that one looks back on.
    """

    cpu_s: dict[PartKind, float]
    gpu_s: dict[PartKind, float]
    beside_cpu: tuple[LayerCosts, ...]
    beside_gpu: tuple[LayerCosts, ...]
    mean_length: float


@dataclass(frozen=True, slots=True)
class PlanPart:
    """All parts of one kind on one device. seconds: of one token; layers: whose they are."""

    kind: str
    device: str
    num_bytes: int
    seconds: float
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlanLayer:
    """One layer's neurons. seconds are of one token: the CPU's and the GPU's work at the same time, then the merge.

    ..._bytes: what they take there; VRAM has the down rows of those in RAM too, where the merge is `hidden`.
    """

    layer_idx: int
    merge: MergePoint
    gpu_neurons: int
    ram_neurons: int
    disk_neurons: int
    gpu_bytes: int
    ram_bytes: int
    disk_bytes: int
    cpu_s: float
    gpu_s: float
    sync_s: float

    @property
    def total_s(self) -> float:
        """Until the layer's neurons are summed up."""
        return max(self.cpu_s, self.gpu_s) + self.sync_s


@dataclass(frozen=True, slots=True)
class Plan:
    """plan.json. gpu: its name, or why there is none; ..._used_bytes: of the budgets; cache_bytes: of RAM, for neurons
    on disk that were read lately; mean_length: tokens that a token looks back on, for the times; greedy_s: what the
    greedy answer would take for its neurons, None where it found none; gap: what a better placement of the neurons
    could save at most, as a share of theirs.
    """

    format: str
    version: int
    model: str
    model_digest: str
    profile_tokens: int
    gpu: str
    vram_bytes: int
    ram_bytes: int
    num_positions: int
    mean_length: float
    kv_dtype: KvDtype
    vram_used_bytes: int
    ram_used_bytes: int
    disk_used_bytes: int
    cache_bytes: int
    parts: tuple[PlanPart, ...]
    layers: tuple[PlanLayer, ...]
    solver: str
    solve_s: float
    gap: float
    greedy_s: float | None

    @property
    def gpu_layers(self) -> dict[str, frozenset[int]]:
        """By kind of part: the layers of which it is on the GPU."""
        return {part.kind: frozenset(part.layers) for part in self.parts if part.device == "gpu"}

    @property
    def gpu_parts(self) -> frozenset[str]:
        """Kinds of parts of which the GPU has any."""
        return frozenset(part.kind for part in self.parts if part.device == "gpu")

    @property
    def neurons_s(self) -> float:
        """Of one token."""
        return sum(layer.total_s for layer in self.layers)

    @property
    def neuron_bytes(self) -> dict[str, int]:
        """By tier."""
        return {tier: sum(getattr(layer, f"{tier}_bytes") for layer in self.layers) for tier in TIER_CODES}

    @property
    def total_s(self) -> float:
        """Of one token."""
        return self.neurons_s + sum(part.seconds for part in self.parts)

    @property
    def tokens_per_s(self) -> float:
        """Predicted, of decoding alone."""
        return 1 / self.total_s


def make_plan(
    manifest: Manifest,
    profile: Profile,
    reads: Sequence[torch.Tensor],
    request: PlanRequest,
    costs: TokenCosts,
    gpu: str,
    predictor_bytes: Sequence[int] | None,
) -> tuple[Plan, list[torch.Tensor]]:
    """The plan and by layer uint8 [E, I], its neurons' tiers. Raise BudgetError, with the numbers, for too little.

    reads: by layer float64 [E, I], how many whole bundles of the neuron a token reads on average (expected_reads).
    """
    parts = model_parts(manifest, request.num_positions, request.kv_dtype, predictor_bytes)
    groups = [group_neurons(each.numpy()) for each in reads]
    chosen = _chosen_start(manifest, parts, groups, request, costs)
    placed, solution = chosen.placed, place_exactly(chosen.problem)
    found = solution.placement
    tiers = [_tiers(each, placed_layer) for each, placed_layer in zip(groups, found.layers, strict=True)]
    used_vram = bytes_on(placed, "gpu") + found.gpu_bytes
    plan = Plan(
        format=FORMAT_NAME,
        version=FORMAT_VERSION,
        model=manifest.model,
        model_digest=profile.model_digest,
        profile_tokens=profile.num_tokens,
        gpu=gpu,
        vram_bytes=request.vram_bytes,
        ram_bytes=request.ram_bytes,
        num_positions=request.num_positions,
        mean_length=costs.mean_length,
        kv_dtype=request.kv_dtype,
        vram_used_bytes=used_vram + GPU_OVERHEAD_BYTES if used_vram else 0,
        ram_used_bytes=request.program_bytes + bytes_on(placed, "ram") + chosen.cache_bytes + found.ram_bytes,
        disk_used_bytes=found.disk_bytes,
        cache_bytes=chosen.cache_bytes,
        parts=_plan_parts(placed, costs),
        layers=tuple(_plan_layer(each, of_layer) for each, of_layer in zip(found.layers, tiers, strict=True)),
        solver=f"{solution.found_by}, {solution.status}",
        solve_s=solution.solve_s,
        gap=solution.gap,
        greedy_s=solution.greedy_s,
    )
    return plan, tiers


def save_plan(folder: Path, plan: Plan, tiers: Sequence[torch.Tensor]) -> None:
    """Raise BudgetError when the disk does not hold it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / TIERS, {f"layers.{idx}": each for idx, each in enumerate(tiers)}, {})
    write_whole(folder / PLAN, (json.dumps(asdict(plan), indent=1) + "\n").encode())


def read_plan(folder: Path, config: ModelConfig, model_digest: str | None = None) -> tuple[Plan, list[torch.Tensor]]:
    """Raise CheckpointError for files that are damaged, of another version or of another model."""
    path = folder / PLAN
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {PLAN}; {REMEDY}")
    values = parse_json_object(path.read_bytes(), str(path), remedy=REMEDY)
    if values.get("format") != FORMAT_NAME or values.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: is {values.get('format')!r} version {values.get('version')!r}, expected {FORMAT_NAME!r} version "
            f"{FORMAT_VERSION}; {REMEDY}"
        )
    try:
        plan = from_json(Plan, values, PLAN)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; {REMEDY}") from error
    if model_digest is not None and plan.model_digest != model_digest:
        raise CheckpointError(f"{path}: is of another store of {plan.model}; {REMEDY}")
    order, last = [layer.layer_idx for layer in plan.layers], config.num_hidden_layers - 1
    if order != list(range(last + 1)):
        raise CheckpointError(f"{path}: has layers {order}, expected 0 to {last}; {REMEDY}")
    shape = (max(1, config.num_experts), config.intermediate_size)
    expected = {f"layers.{idx}": (shape, torch.uint8) for idx in range(config.num_hidden_layers)}
    tiers = list(read_tensors(folder / TIERS, expected, REMEDY).values())
    for layer, of_layer in zip(plan.layers, tiers, strict=True):
        counts = tuple(int((of_layer == code).sum()) for code in TIER_CODES.values())
        if counts != (layer.gpu_neurons, layer.ram_neurons, layer.disk_neurons):
            raise CheckpointError(f"{folder / TIERS}: layer {layer.layer_idx} is not as {PLAN} has it; {REMEDY}")
    return plan, tiers


@dataclass(frozen=True, slots=True)
class _Start:
    """Where everything but neurons is, and the neurons' problem that it and the cache of the disk's leave."""

    placed: list[PlacedPart]
    problem: PlacementProblem
    cache_bytes: int


def _chosen_start(
    manifest: Manifest,
    parts: Sequence[Part],
    groups: Sequence[NeuronGroups],
    request: PlanRequest,
    costs: TokenCosts,
) -> _Start:
    """What comes out best when neurons are placed greedily, of three ways to share VRAM between them and the rest.

    The rest on the GPU where that is faster; nothing of it; all of it, where RAM is short. Raises BudgetError for too
    little memory.
    """
    faster = [kind for kind in GPU_KINDS if costs.gpu_s.get(kind, math.inf) < costs.cpu_s.get(kind, 0.0)]
    if "attention" in faster:
        faster = [kind for kind in GPU_KINDS if kind in faster or kind == "KV cache"]
    starts: list[_Start] = []
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


def _greedy_s(start: _Start, costs: TokenCosts) -> float:
    """Seconds of a token with neurons placed greedily; infinite where that finds no way."""
    greedy = place_greedily(start.problem)
    parts_s = sum(part.seconds for part in _plan_parts(start.placed, costs))
    return math.inf if greedy is None else parts_s + greedy.objective_s


def _start(
    manifest: Manifest,
    placed: list[PlacedPart],
    vram_left: int,
    groups: Sequence[NeuronGroups],
    request: PlanRequest,
    costs: TokenCosts,
) -> _Start:
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
        return _Start(placed, PlacementProblem(layers, vram_left, ram_left, allow_disk=False), 0)
    least = (max(1, config.num_experts_per_tok) * config.intermediate_size + 1) * bundle  # all that a layer can ask for
    cache_bytes = max(least, int(CACHE_SHARE * ram_left) // bundle * bundle)
    if cache_bytes > ram_left:
        raise BudgetError(
            f"--ram {format_bytes(request.ram_bytes)}: reading neurons from disk takes a cache of "
            f"{format_bytes(cache_bytes)} at least, and only {format_bytes(ram_left)} are left for it, which is "
            f"{cache_bytes - ram_left} bytes too few; give more --ram, a smaller --ctx or --quant, or --vram that "
            "holds attention and head"
        )
    problem = PlacementProblem(layers, vram_left, ram_left - cache_bytes, allow_disk=True)
    return _Start(placed, problem, cache_bytes)


def _tiers(groups: NeuronGroups, placed: LayerPlacement) -> torch.Tensor:
    """uint8 [E, I]."""
    flat = torch.empty(len(groups.order), dtype=torch.uint8)
    for group_idx, tier in enumerate(placed.tiers):
        members = groups.order[groups.bounds[group_idx] : groups.bounds[group_idx + 1]]
        flat[torch.from_numpy(members).long()] = TIER_CODES[tier]
    return flat.view(-1, groups.intermediate_size)


def _plan_layer(placed: LayerPlacement, tiers: torch.Tensor) -> PlanLayer:
    gpu, ram, disk = (int((tiers == code).sum()) for code in TIER_CODES.values())
    return PlanLayer(
        placed.layer_idx,
        placed.merge,
        gpu,
        ram,
        disk,
        placed.gpu_bytes,
        placed.ram_bytes,
        placed.disk_bytes,
        placed.cpu_s,
        placed.gpu_s,
        placed.sync_s,
    )


def _plan_parts(placed: Sequence[PlacedPart], costs: TokenCosts) -> tuple[PlanPart, ...]:
    """By kind and device; a kind's seconds are shared out by bytes."""
    totals: dict[PartKind, int] = {}
    groups: dict[tuple[PartKind, Device], int] = {}
    layers: dict[tuple[PartKind, Device], list[int]] = {}
    for each in placed:
        kind, size = each.part.kind, each.part.num_bytes
        totals[kind] = totals.get(kind, 0) + size
        groups[kind, each.device] = groups.get((kind, each.device), 0) + size
        of_group = layers.setdefault((kind, each.device), [])
        of_group += [] if each.part.layer_idx is None else [each.part.layer_idx]
    seconds: dict[Device, dict[PartKind, float]] = {"gpu": costs.gpu_s, "ram": costs.cpu_s}
    return tuple(
        PlanPart(
            kind,
            device,
            size,
            seconds[device].get(kind, 0.0) * size / max(1, totals[kind]),
            tuple(layers[kind, device]),
        )
        for (kind, device), size in groups.items()
    )
