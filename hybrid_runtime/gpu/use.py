"""Whether there is a GPU to compute on, and a decoder that does."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

import torch

from hybrid_kernels.team import Team
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import BudgetError, UsageError
from hybrid_runtime.gpu.device import GpuDevice
from hybrid_runtime.load_options import LoadOptions
from hybrid_runtime.machine import describe_machine
from hybrid_runtime.model.kv_cache import KvCache
from hybrid_runtime.model.weights import DecoderWeights
from hybrid_runtime.sizes import format_bytes

if TYPE_CHECKING:  # imports triton, which not every system has
    from hybrid_runtime.gpu.decoder import GpuDecoder
    from hybrid_runtime.model.decoder import PredictorMode

OLDEST = (8, 0)  # compute capability: Triton compiles for none before, and the kernels need its tf32
LESS = 0.9  # of the budget, after the driver had no more
Result = TypeVar("Result")


def find_device() -> GpuDevice | None:
    """The first GPU of NVIDIA's, if the kernels are for it; the CPU where Triton interprets (TRITON_INTERPRET=1, for
    tests); None without both.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return GpuDevice(torch.device("cpu"))
    if not torch.cuda.is_available() or torch.version.hip is not None or find_spec("triton") is None:
        return None
    return GpuDevice(torch.device("cuda", 0)) if torch.cuda.get_device_capability(0) >= OLDEST else None


def chosen_device(config: ModelConfig, options: LoadOptions) -> GpuDevice | None:
    """What options ask for. Raises UsageError where there is none, and for a model that it cannot compute."""
    if not options.vram_bytes or options.simulates_gpu:
        return None
    device = find_device()
    if device is None:
        reason = describe_machine().no_gpu_reason or "it is not NVIDIA's, or older than compute capability 8.0"
        raise UsageError(
            f"vram_bytes {options.vram_bytes}: no GPU to compute on ({reason}); leave it at 0, or simulate one"
        )
    from hybrid_runtime.gpu.decoder import require_computable  # noqa: PLC0415  # imports triton

    require_computable(config)
    torch.zeros(1, device=device.torch_device)  # CUDA's own share of RAM is part of the program that is measured next
    return device


def gpu_decoder(
    config: ModelConfig, weights: DecoderWeights, mode: PredictorMode, team: Team, device: GpuDevice, cache: KvCache
) -> GpuDecoder:
    """With all the memory that it will take of the GPU for this cache."""
    from hybrid_runtime.gpu.decoder import GpuDecoder  # noqa: PLC0415  # imports triton

    # sums of a prompt's products in float16 would be beyond its range, and not what single tokens make
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    decoder = GpuDecoder(config, weights, mode, team, device)
    decoder.program_of(cache)
    return decoder


def with_less_after_oom(options: LoadOptions, load: Callable[[LoadOptions], Result]) -> Result:
    """What load makes; where the driver runs out of memory, once more with less. Raises BudgetError the second time."""
    try:
        return load(options)
    except torch.cuda.OutOfMemoryError:
        less = int(LESS * options.vram_bytes)
        options.say(
            f"the GPU has run out of memory with {format_bytes(options.vram_bytes)}: trying {format_bytes(less)}, once"
        )
    gc.collect()
    torch.cuda.empty_cache()
    try:
        return load(replace(options, vram_bytes=less))
    except torch.cuda.OutOfMemoryError as error:
        raise BudgetError(f"the GPU has run out of memory with {format_bytes(less)}, too; give less --vram") from error
