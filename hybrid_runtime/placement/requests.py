"""What a plan is asked for, and what a token costs wherever things are."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_runtime.model.kv_cache import KvDtype
from hybrid_runtime.placement.parts import PartKind
from hybrid_runtime.placement.problem import LayerCosts


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
