"""From a store, its profile and this machine to a plan: what hybrid-place and hybrid-run both do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hybrid_runtime.benchmarking.bytes_touched import NeuronRows
from hybrid_runtime.budget import MemoryNeeds, plan_memory
from hybrid_runtime.errors import BudgetError, UsageError
from hybrid_runtime.machine import current_rss_bytes, describe_machine
from hybrid_runtime.model.decoder import PredictorMode, choose_predictor_mode
from hybrid_runtime.model.kv_cache import KvDtype, check_kv_dtype
from hybrid_runtime.placement.costs import cpu_part_seconds, gpu_part_seconds, layer_costs
from hybrid_runtime.placement.decode_time import DecodeConditions, predict_decode_time, token_bytes
from hybrid_runtime.placement.parts import GPU_OVERHEAD_BYTES
from hybrid_runtime.placement.plan import Plan, make_plan
from hybrid_runtime.placement.reads import (
    Reading,
    expected_reads,
    expected_rows,
    total_rows,
)
from hybrid_runtime.placement.requests import PlanRequest, TokenCosts
from hybrid_runtime.placement.sampled_ratios import SampledRatios, sampled_ratios
from hybrid_runtime.profiling.profile import Profile
from hybrid_runtime.profiling.profile_file import read_profile
from hybrid_runtime.sizes import format_bytes
from hybrid_runtime.speeds.gpu import KNOWN_GPUS, GpuSpeeds
from hybrid_runtime.speeds.machine_speeds import MachineSpeeds, machine_speeds, with_disk_of
from hybrid_runtime.store.beside import store_digest
from hybrid_runtime.store.predictor_files import PredictorHeader
from hybrid_runtime.store.reader import Store

PLANS_FOLDER = "plans"
ASSUMED_NAMED_FOR_ONE = 1.3  # neurons, of predictors of which nothing tells
ASSUMED_GATES_FOR_ONE = 2.0  # of dReLU: the up value is as often negative

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Planner:
    """Everything that plans for one store on one machine have in common. gpu: None plans for the CPU alone.

    reads, rows: by layer, bundles that a token reads of each neuron, and rows of all. program_bytes: of the process
    without the model.
    """

    store: Store
    profile: Profile
    reads: list[torch.Tensor]
    rows: list[NeuronRows]
    speeds: MachineSpeeds
    gpu: GpuSpeeds | None
    no_gpu_reason: str
    conditions: DecodeConditions
    predictor_bytes: tuple[int, ...] | None
    num_positions: int
    program_bytes: int

    def plan(self, vram_bytes: int, ram_bytes: int, *, allow_disk: bool) -> tuple[Plan, list[torch.Tensor]]:
        """Raise BudgetError, with the numbers, for budgets that cannot hold the model.

        What a run may take beyond what it is expected to stays free of neurons: a run refuses where that does not fit.
        """
        manifest = self.store.manifest
        gpu = self.gpu if vram_bytes else None
        needs = MemoryNeeds(0, self.num_positions, self.conditions.kv_dtype)
        memory = replace(plan_memory(manifest.config, needs, self.program_bytes), kv_cache=0)  # a part of its own
        request = PlanRequest(
            vram_bytes if gpu is not None else 0,
            ram_bytes,
            self.num_positions,
            self.conditions.kv_dtype,
            memory.expected,
            allow_disk,
            max(0, ram_bytes - memory.room_in(ram_bytes) - memory.expected),
        )
        name = self.no_gpu_reason if gpu is None else gpu.name
        return make_plan(manifest, self.profile, self.reads, request, self._costs(gpu), name, self.predictor_bytes)

    def _costs(self, gpu: GpuSpeeds | None) -> TokenCosts:
        manifest, speeds, conditions = self.store.manifest, self.speeds, self.conditions
        beside_cpu, beside_gpu = (
            tuple(layer_costs(manifest, speeds, conditions, rows, gpu, attention_on_gpu=on_gpu) for rows in self.rows)
            for on_gpu in (False, True)
        )
        return TokenCosts(
            cpu_part_seconds(predict_decode_time(manifest, speeds, conditions)),
            {} if gpu is None else gpu_part_seconds(token_bytes(manifest, conditions), manifest, gpu),
            beside_cpu,
            beside_gpu,
            conditions.mean_length,
        )


def require_vram(vram_bytes: int, gpu_name: str | None, gpu_bytes: int) -> None:
    """Raise BudgetError for more than the GPU has, where there is one, and for too little to use any."""
    if gpu_name is not None and vram_bytes > gpu_bytes:
        raise BudgetError(
            f"--vram {format_bytes(vram_bytes)}: {gpu_name} has {format_bytes(gpu_bytes)}; give at most that"
        )
    if 0 < vram_bytes <= GPU_OVERHEAD_BYTES:
        raise BudgetError(
            f"--vram {format_bytes(vram_bytes)}: CUDA and buffers alone take {format_bytes(GPU_OVERHEAD_BYTES)}; give "
            "more, or leave --vram out"
        )


def plan_folder_name(vram_bytes: int, ram_bytes: int, num_positions: int, *others: object) -> str:
    """Of a plan, beside its store. others: what else it follows from, which the name tells apart by a digest."""
    digest = hashlib.sha256(repr((vram_bytes, ram_bytes, num_positions, *others)).encode()).hexdigest()[:8]
    return f"vram-{vram_bytes >> 20}M-ram-{ram_bytes >> 20}M-ctx-{num_positions}-{digest}"


def make_planner(
    store: Store,
    profile_folder: Path,
    predictors: PredictorHeader | None,
    *,
    mode: PredictorMode | None,
    num_positions: int,
    kv_dtype: KvDtype,
    num_threads: int,
    gpu_name: str | None,
    cache_dir: Path,
    say: Say,
    program_bytes: int | None = None,
    profile: Profile | None = None,
) -> Planner:
    """Read the profile (or take the one given, which has no samples) and measure the machine, unless that was done.

    predictors: trained ones that decoding will use; mode: what it does where there are none, None: as the model was
    made; gpu_name: of KNOWN_GPUS, to plan for one that is not here; program_bytes: of the process without the model,
    None: what it takes now. Raises UsageError for an unknown name, and for what the model cannot have.
    """
    config = store.manifest.config
    if gpu_name is not None and gpu_name not in KNOWN_GPUS:  # before anything is measured
        raise UsageError(f"--gpu {gpu_name}: expected one of {', '.join(KNOWN_GPUS)}")
    check_kv_dtype(config, kv_dtype)
    mode = "trained" if predictors is not None else choose_predictor_mode(config, mode)
    program_bytes = current_rss_bytes() if program_bytes is None else program_bytes
    ratios = SampledRatios(None, None)
    if profile is None:
        profile = read_profile(profile_folder, config, store_digest(store))
        ratios = sampled_ratios(store, profile_folder)
    machine = describe_machine()
    speeds = machine_speeds(machine, store.manifest.quantization.weights, num_threads, cache_dir, say)
    speeds = with_disk_of(speeds, store.folder, cache_dir, say)
    reading = _reading(predictors, mode, ratios, say)
    predictor_bytes = None if predictors is None else tuple(layer.num_bytes for layer in predictors.layers)
    rows = expected_rows(profile, config, reading)
    conditions = DecodeConditions(
        total_rows(rows),
        every_gate=reading.named_for_one is None,
        uses_predictor=reading.named_for_one is not None,
        mean_length=num_positions / 2,
        kv_dtype=kv_dtype,
        predictor_bytes=None if predictor_bytes is None else sum(predictor_bytes),
        every_row=mode == "off",
    )
    return Planner(
        store,
        profile,
        expected_reads(profile, config, reading),
        rows,
        speeds,
        speeds.gpu if gpu_name is None else KNOWN_GPUS[gpu_name],
        machine.no_gpu_reason or "",
        conditions,
        predictor_bytes,
        num_positions,
        program_bytes,
    )


def _reading(predictors: PredictorHeader | None, mode: PredictorMode, ratios: SampledRatios, say: Say) -> Reading:
    """What is measured; a line for what has to be assumed."""
    named_for_one = None
    if predictors is not None or mode == "mask":
        named_for_one = ratios.named_for_one if predictors is None else _trained_named_for_one(predictors)
        if named_for_one is None:
            named_for_one = ASSUMED_NAMED_FOR_ONE
            say(f"nothing says how many neurons the predictors name: assuming {named_for_one} for one that fires")
    gates_for_one = ratios.gates_for_one
    if gates_for_one is None:
        gates_for_one = ASSUMED_GATES_FOR_ONE
        say(f"the profile has no sample of what gates read: assuming that {gates_for_one} fire for a neuron that does")
    return Reading(named_for_one, gates_for_one, every_row=mode == "off")


def _trained_named_for_one(predictors: PredictorHeader) -> float | None:
    """Neurons named for one that fires, as their training found it; imported ones had none."""
    named = sum(layer.predicted_density or 0.0 for layer in predictors.layers)
    fired = sum(layer.true_density or 0.0 for layer in predictors.layers)
    return named / fired if named and fired else None
