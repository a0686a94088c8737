"""Loading an Engine for a program: threads, the VRAM notice, progress, and what --verbose tells."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import cast

import torch

from hybrid_kernels.native.instruction_sets import instruction_set
from hybrid_runtime.cli.program import say
from hybrid_runtime.engine import Engine
from hybrid_runtime.gpu.use import find_device
from hybrid_runtime.load_options import LoadOptions
from hybrid_runtime.machine import describe_machine, huge_page_bytes, physical_cores, usable_cores
from hybrid_runtime.model.decoder import PredictorMode
from hybrid_runtime.model.kv_cache import KvDtype
from hybrid_runtime.progress import console_progress
from hybrid_runtime.sizes import format_bytes
from hybrid_runtime.spreading import where_neurons_are
from hybrid_runtime.store.memory import LoadMode
from hybrid_runtime.stores import ModelRequest


def load_engine(
    request: ModelRequest,
    *,
    vram_bytes: int,
    ram_bytes: int | None,
    num_positions: int | None,
    predictor: str | None,
    kv_dtype: str | None,
    load: str,
    threads: int | None,
    cache_dir: Path | None,
    verbose: bool,
    scores: bool = False,
    simulate_gpu: bool = False,
) -> Engine:
    """Load the model as the flags ask, telling the user on stderr what takes long and what cannot be had."""
    num_threads = threads or min(physical_cores(), usable_cores())
    use_threads(num_threads)
    is_there = find_device() is not None
    if vram_bytes > 0 and not simulate_gpu and not is_there:
        _explain_vram(vram_bytes)
    options = LoadOptions(
        ram_bytes=ram_bytes,
        vram_bytes=vram_bytes if simulate_gpu or is_there else 0,
        simulates_gpu=simulate_gpu,
        num_positions=num_positions,
        predictor=cast("PredictorMode | None", predictor),  # click offers only these
        kv_dtype=cast("KvDtype | None", kv_dtype),
        scores=scores,
        load=cast("LoadMode", load),
        threads=threads,
        cache_dir=cache_dir,
        progress=console_progress(),
        say=say,
    )
    started_s = time.perf_counter()
    engine = Engine.load(request, options)
    if verbose:
        _describe(engine, load, time.perf_counter() - started_s)
    return engine


def use_threads(num_threads: int) -> None:
    """Give torch and Numba that many threads; Numba reads the variable when it is imported.

    Both must agree: Numba's OpenMP layer shares torch's pool and sets its size again.
    """
    torch.set_num_threads(num_threads)
    numba = sys.modules.get("numba")
    if numba is None:
        os.environ["NUMBA_NUM_THREADS"] = str(num_threads)
    else:  # a program that calls us twice: the pool cannot grow, and Numba refuses to compile once the variable changed
        numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))


def _explain_vram(vram_bytes: int) -> None:
    machine = describe_machine()
    reason = machine.no_gpu_reason or f"{machine.gpu_name} has no CUDA"
    say(f"--vram {format_bytes(vram_bytes)} is honoured as 0: no usable GPU ({reason})")


def _describe(engine: Engine, load: str, load_s: float) -> None:
    machine = describe_machine()
    config = engine.config
    sequence = engine.sequence
    vector_sets = ", ".join(machine.instruction_sets) or "no vector sets"
    say(f"machine    {machine.cpu_name}, {sequence.decoder.team.num_threads} threads, {vector_sets}")
    say(f"kernels    compiled for {instruction_set()}")
    say(f"backend    torch {machine.torch_version} on the CPU; GPU: {machine.gpu_name or machine.no_gpu_reason}")
    decoder = sequence.decoder
    if decoder.way:
        say(f"GPU        {decoder.way}")
    say(f"store      {engine.store.folder}, {format_bytes(engine.store.num_bytes)}, loaded in {load_s:.2f} s")
    huge = f"{format_bytes(huge_page_bytes())} of this process in huge pages"
    is_mapped = load == "mmap" and engine.spread is None
    say(f"weights    {'mapped from their files' if is_mapped else 'in anonymous memory'}, {huge}")
    tiering = decoder.weights.tiering
    if engine.spread is not None and tiering is not None:
        plan = engine.spread.plan
        say(f"neurons    {where_neurons_are(plan)}; expected {plan.tokens_per_s:.1f} tokens/s; placed by {plan.solver}")
        if plan.disk_used_bytes:
            reads = "asynchronous" if tiering.cache.is_asynchronous else "one by one, by who waits"
            say(f"disk       a cache of {format_bytes(plan.cache_bytes)}; reads are {reads}")
    say(f"family     {config.family}, {config.num_hidden_layers} layers, {config.activation.kind}")
    say(f"predictor  {sequence.decoder.predictor_mode}")
    say(f"context    {sequence.cache.num_positions} tokens, keys and values in {sequence.cache.keys.dtype}")
    say(f"memory     planned {format_bytes(engine.memory_plan.total)}: {engine.memory_plan.describe()}")
