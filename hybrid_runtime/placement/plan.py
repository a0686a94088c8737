"""A placement plan: which part and which neuron is in which tier, under which budgets, with what it should come to.

plan.json              everything but the neurons; written last
tiers.safetensors      layers.<l>: uint8 [E, I], 0 gpu, 1 ram, 2 disk
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import CheckpointError
from hybrid_runtime.model.kv_cache import KvDtype
from hybrid_runtime.placement.exact import place_exactly
from hybrid_runtime.placement.grouping import NeuronGroups, group_neurons
from hybrid_runtime.placement.parts import (
    GPU_OVERHEAD_BYTES,
    PlacedPart,
    bytes_on,
    model_parts,
)
from hybrid_runtime.placement.problem import (
    LayerPlacement,
    MergePoint,
)
from hybrid_runtime.placement.requests import PlanRequest, TokenCosts
from hybrid_runtime.placement.starts import chosen_start, part_seconds
from hybrid_runtime.profiling.profile import Profile
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
    chosen = chosen_start(manifest, parts, groups, request, costs)
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
    """By kind and device."""
    return tuple(
        PlanPart(
            kind,
            device,
            sum(each.part.num_bytes for each in placed if (each.part.kind, each.device) == (kind, device)),
            seconds,
            tuple(
                each.part.layer_idx
                for each in placed
                if (each.part.kind, each.device) == (kind, device) and each.part.layer_idx is not None
            ),
        )
        for (kind, device), seconds in part_seconds(placed, costs).items()
    )
