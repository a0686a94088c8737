"""What hybrid-run does by itself before it generates with --vram: a short profile and a plan, once.

Both are kept with the store, or in the user's cache; later runs find them. The text is what the package carries, which
is short and general: a profile of the user's own text places neurons better.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hybrid_runtime.cli.program import say
from hybrid_runtime.engine import Engine, default_cache_dir, find_predictors
from hybrid_runtime.errors import BudgetError, CheckpointError
from hybrid_runtime.machine import describe_machine, ram_limit_bytes
from hybrid_runtime.placement.plan import PLAN, Plan, read_plan, save_plan
from hybrid_runtime.placement.planning import PLANS_FOLDER, make_planner, plan_folder_name, require_vram
from hybrid_runtime.profiling.profile_file import PROFILE, PROFILE_FOLDER, has_profile
from hybrid_runtime.profiling.run import ProfileRequest, make_profile, profiling_bytes
from hybrid_runtime.progress import console_progress
from hybrid_runtime.shipped import SHIPPED_TEXT
from hybrid_runtime.sizes import format_bytes
from hybrid_runtime.store.beside import beside, store_digest

WINDOW = 256
SMALL_MODEL_BYTES = 1 << 30
NUM_TOKENS = 8192  # of a small model: half a minute
NUM_TOKENS_OF_LARGE = 1024  # some minutes where a token takes a tenth of a second
SAMPLE_BYTES = 16 << 20


def prepare_plan(engine: Engine, vram_bytes: int, ram_bytes: int | None, cache_dir: Path | None) -> Plan | None:
    """The plan for these budgets, made now where it was not made before; None, and a line, without room to profile.

    Raises BudgetError for too little memory, of either kind.
    """
    store, cache = engine.store, cache_dir or default_cache_dir()
    sequence = engine.sequence
    machine, mode, team = describe_machine(), sequence.decoder.predictor_mode, sequence.decoder.team
    require_vram(vram_bytes, machine.gpu_name, machine.vram_bytes)
    folder = beside(store, cache)
    profile_folder = folder / PROFILE_FOLDER
    if not has_profile(profile_folder) and not _profile_shortly(engine, profile_folder, ram_bytes):
        return None
    ram = ram_bytes if ram_bytes is not None else ram_limit_bytes()  # not what is free now: the next run's plan too
    positions = sequence.cache.num_positions
    predictors = find_predictors(store, cache).header if mode == "trained" else None
    others = (sequence.cache.dtype, mode, predictors, team.num_threads, machine.gpu_name, machine.vram_bytes)
    name = plan_folder_name(vram_bytes, ram, positions, *others)
    plan_folder = folder / PLANS_FOLDER / f"run-{name}"
    plan = _kept_plan(engine, plan_folder, profile_folder)
    if plan is None:
        planner = make_planner(
            store,
            profile_folder,
            predictors,
            mode=None if predictors is not None else mode,
            num_positions=positions,
            kv_dtype=sequence.cache.dtype,
            num_threads=team.num_threads,
            gpu_name=None,
            cache_dir=cache,
            say=say,
            program_bytes=engine.memory_plan.program,  # now the model is loaded, which has parts of its own
        )
        plan, tiers = planner.plan(vram_bytes, ram, allow_disk=True)
        save_plan(plan_folder, plan, tiers)
        say(
            f"planned: {plan.tokens_per_s:.1f} tokens/s expected, {format_bytes(plan.vram_used_bytes)} of VRAM and "
            f"{format_bytes(plan.ram_used_bytes)} of RAM used. Better: hybrid-profile {store.folder} --text FILE with "
            "text like yours, then hybrid-predictors train"
        )
    return plan


def _kept_plan(engine: Engine, folder: Path, profile_folder: Path) -> Plan | None:
    """The one that an earlier run left; None where it is not there or damaged, or follows from what is past."""
    try:
        plan, _ = read_plan(folder, engine.config, store_digest(engine.store))
    except CheckpointError:
        return None
    is_newer = (folder / PLAN).stat().st_mtime_ns >= (profile_folder / PROFILE).stat().st_mtime_ns
    return plan if is_newer else None


def _profile_shortly(engine: Engine, folder: Path, ram_bytes: int | None) -> bool:
    """Count on the package's own text. False, and a line, where that would take more memory than was promised."""
    store, sequence = engine.store, engine.sequence
    window = min(WINDOW, sequence.cache.num_positions)
    tokens = NUM_TOKENS if store.num_bytes < SMALL_MODEL_BYTES else NUM_TOKENS_OF_LARGE
    if window < 2:
        raise BudgetError(f"--ctx {window}: too short to profile with; give at least 2, or leave --vram out")
    request = ProfileRequest((SHIPPED_TEXT,), max(tokens, window), window, SAMPLE_BYTES)
    if sequence.decoder.predictor_mode == "trained":
        say(f"no plan for --vram: run hybrid-profile {store.folder} --text FILE once, which needs exact decoding")
        return False
    extra = profiling_bytes(engine.config, request)
    memory = replace(engine.memory_plan, workspace=engine.memory_plan.workspace + extra)
    if ram_bytes is not None and memory.total > ram_bytes:
        say(
            f"no plan for --vram: profiling takes {format_bytes(memory.total)}, more than --ram; run hybrid-profile "
            f"{store.folder} --text FILE once, with more"
        )
        return False
    progress = console_progress()
    progress.start(f"profiling {store.manifest.model} once, for --vram", max(tokens, window), "tokens")
    seen = 0

    def on_window(num_tokens: int) -> None:
        nonlocal seen
        progress.advance(num_tokens - seen)
        seen = num_tokens

    try:
        make_profile(store, sequence, engine.tokenizer, request, folder, on_window)
    finally:
        progress.done()
    return True
