"""A model spread over tiers when it is opened: the plan for its budgets, made now where it was not made before.

A plan needs a profile. Where there is none, the model runs once spread blindly, every neuron as likely as any other,
and is profiled on the text that the package carries; a profile of the user's own text places neurons better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import filelock
import torch

from hybrid_runtime.budget import MemoryNeeds, MemoryPlan, plan_memory
from hybrid_runtime.errors import BudgetError, CheckpointError, UsageError
from hybrid_runtime.generation.sequence import TokenSequence
from hybrid_runtime.gpu.device import GpuDevice
from hybrid_runtime.machine import describe_machine
from hybrid_runtime.model.decoder import PredictorMode
from hybrid_runtime.model.kv_cache import KvDtype
from hybrid_runtime.model.weights import DecoderWeights, tiered_weights
from hybrid_runtime.placement.parts import GPU_OVERHEAD_BYTES
from hybrid_runtime.placement.plan import PLAN, Plan, read_plan, save_plan
from hybrid_runtime.placement.planning import PLANS_FOLDER, make_planner, plan_folder_name, require_vram
from hybrid_runtime.profiling.profile import Profile, TextDigest, empty_layers, watched_neurons
from hybrid_runtime.profiling.profile_file import PROFILE, PROFILE_FOLDER, has_profile
from hybrid_runtime.profiling.run import ProfileRequest, make_profile, profiling_bytes
from hybrid_runtime.progress import Progress
from hybrid_runtime.shipped import SHIPPED_TEXT
from hybrid_runtime.sizes import format_bytes
from hybrid_runtime.speeds.gpu import KNOWN_GPUS
from hybrid_runtime.store.beside import beside, store_digest
from hybrid_runtime.store.manifest import Manifest
from hybrid_runtime.store.predictor_files import PredictorHeader
from hybrid_runtime.store.reader import Store
from hybrid_runtime.text.tokenizer import Tokenizer
from hybrid_runtime.tiers.disk_cache import DiskCache
from hybrid_runtime.tiers.load import load_tiered
from hybrid_runtime.tiers.memory import tier_working_bytes
from hybrid_runtime.tiers.tiering import Tiering

SIMULATED_GPU = "rtx-4060"  # of KNOWN_GPUS: what a plan for a GPU that is not there takes its speeds from
WINDOW = 256
MOST_TOKENS, LEAST_TOKENS = 8192, 1024  # of a small model, and of a large one
BYTES_TIMES_TOKENS = 8192 * (100 << 20)  # a minute or so
SAMPLE_BYTES = 16 << 20
LOCK = ".lock"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class SpreadRequest:
    """What a plan follows from, beside the store. ram_bytes: the budget of everything but the simulated GPU's memory.

    predictors: trained ones that lie beside the store; is_simulated: whether the GPU's tier is in this process's RAM;
    has_device: whether a GPU computes, which shows no neurons to who makes a profile.
    program_bytes: of the process without the model; extra_bytes: that the caller will take beside it; profiles: whether
    to make a profile where there is none.
    """

    vram_bytes: int
    ram_bytes: int
    is_simulated: bool
    num_positions: int
    kv_dtype: KvDtype
    mode: PredictorMode
    predictors: PredictorHeader | None
    num_threads: int
    cache_dir: Path
    program_bytes: int
    extra_bytes: int = 0
    profiles: bool = True
    has_device: bool = False


@dataclass(frozen=True, slots=True)
class Spread:
    """A plan and by layer uint8 [E, I], its neurons' tiers."""

    plan: Plan
    tiers: list[torch.Tensor]

    def memory_plan(self, manifest: Manifest, request: SpreadRequest) -> MemoryPlan:
        """What the process will take of its RAM budget, that is without a simulated GPU's memory."""
        needs = MemoryNeeds(0, request.num_positions, request.kv_dtype)
        memory = plan_memory(manifest.config, needs, request.program_bytes)
        in_ram = {part.kind: part.num_bytes for part in self.plan.parts if part.device == "ram"}
        neurons = self.plan.neuron_bytes["ram"] + self.plan.cache_bytes
        cache = in_ram.pop("KV cache", 0)
        working = memory.workspace + tier_working_bytes(manifest.config, manifest.quantization.weights)
        working += request.extra_bytes
        return replace(memory, weights=neurons + sum(in_ram.values()), kv_cache=cache, workspace=working)

    @property
    def simulated_bytes(self) -> int:
        """Of the GPU's tier, without what CUDA would take."""
        return max(0, self.plan.vram_used_bytes - GPU_OVERHEAD_BYTES)


def find_spread(
    store: Store, request: SpreadRequest, profile: Callable[[Spread, ProfileRequest], None], say: Say
) -> Spread:
    """The plan that an earlier run left, or a new one. profile: runs the model spread so, and saves its profile.

    Raises BudgetError, with the numbers, for budgets that cannot hold what must be held.
    """
    machine, folder = describe_machine(), beside(store, request.cache_dir)
    require_vram(request.vram_bytes, machine.gpu_name, machine.vram_bytes)
    profile_folder = folder / PROFILE_FOLDER
    is_there = has_profile(profile_folder)
    if not is_there and not (request.profiles and _profiled(store, request, profile, say)):
        return _planned(store, request, blind_profile(store), say)
    others = (request.kv_dtype, request.mode, request.predictors, request.num_threads, request.is_simulated)
    name = plan_folder_name(request.vram_bytes, request.ram_bytes, request.num_positions, *others)
    plan_folder = folder / PLANS_FOLDER / f"run-{name}"
    kept = _kept(store, plan_folder, profile_folder)
    if kept is not None and kept.memory_plan(store.manifest, request).total <= request.ram_bytes:
        return kept
    made = _planned(store, request, None, say)
    _keep(plan_folder, made, say)
    return made


def _keep(folder: Path, made: Spread, say: Say) -> None:
    """For the next run, which can do without: another one may be writing it, or the disk be full."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / LOCK, timeout=0):
            save_plan(folder, made.plan, made.tiers)
    except (BudgetError, OSError) as error:  # a lock that somebody has is an OSError, too
        say(f"this plan is not kept for the next run: {error}")


def _profiled(
    store: Store, request: SpreadRequest, profile: Callable[[Spread, ProfileRequest], None], say: Say
) -> bool:
    """Make a profile. False, and a line, where there is no room for one, or nothing exact to make it with."""
    better = f"neurons are placed blindly: run hybrid-profile {store.folder} --text FILE once"
    if request.mode == "trained":
        say(f"{better}, which needs exact decoding")
        return False
    asked = profile_request(store, request.num_positions)
    request = replace(request, vram_bytes=0) if request.has_device else request
    extra = profiling_bytes(store.manifest.config, asked)
    try:
        blind = _planned(store, request, blind_profile(store), _say_nothing, extra)
    except BudgetError:
        say(f"{better}, with {format_bytes(extra)} more memory")
        return False
    say("nobody has profiled this model: doing so now, once, with neurons placed blindly")
    try:
        profile(blind, asked)
    except (UsageError, OSError) as error:  # another run is at it, or left one unfinished, or the disk is full
        say(f"{error}; this time neurons are placed blindly")
        return False
    return True


def _say_nothing(message: str) -> None:
    del message


def load_spread(store: Store, spread: Spread, device: GpuDevice | None = None) -> DecoderWeights:
    """The weights in memory, as the plan has them. device: the GPU, unless it is simulated."""
    config, plan = store.manifest.config, spread.plan
    loaded = load_tiered(store, plan, spread.tiers, None if device is None else device.torch_device)
    bundle_bytes = loaded.networks[0][0].bundle_bytes
    most_misses = max(1, config.num_experts_per_tok) * config.intermediate_size
    cache = DiskCache(plan.cache_bytes // bundle_bytes, bundle_bytes, most_misses)
    return tiered_weights(config, loaded, Tiering(plan, cache, loaded.gpu_bytes))


def profile_with_progress(
    store: Store,
    sequence: TokenSequence,
    tokenizer: Tokenizer,
    request: ProfileRequest,
    folder: Path,
    progress: Progress,
) -> None:
    """Make a profile and show how far it is."""
    seen = 0
    progress.start(f"profiling {store.manifest.model}", request.num_tokens or 0, "tokens")

    def on_window(num_tokens: int) -> None:
        nonlocal seen
        progress.advance(num_tokens - seen)
        seen = num_tokens

    try:
        make_profile(store, sequence, tokenizer, request, folder, on_window)
    finally:
        progress.done()


def profile_request(store: Store, num_positions: int) -> ProfileRequest:
    """Of a short profile on the package's own text. Raises BudgetError for a context too short to see anything in."""
    window = min(WINDOW, num_positions)
    if window < 2:
        raise BudgetError(f"--ctx {window}: too short to profile with; give at least 2")
    tokens = min(MOST_TOKENS, max(LEAST_TOKENS, BYTES_TIMES_TOKENS // store.num_bytes))
    return ProfileRequest((SHIPPED_TEXT,), max(tokens, window), window, SAMPLE_BYTES)


def blind_profile(store: Store) -> Profile:
    """One in which every neuron fires as often as any other, and every expert gets as many tokens."""
    config = store.manifest.config
    watched = watched_neurons(config)
    layers = []
    for layer in empty_layers(config, len(watched)):
        tokens = torch.ones_like(layer.tokens)
        layers.append(replace(layer, tokens=tokens, fired=torch.ones_like(layer.fired)))
    per_token = max(1, config.num_experts) // max(1, config.num_experts_per_tok)
    text = TextDigest("0" * 64, max(1, per_token))
    no_text = torch.zeros(0, 2, dtype=torch.int32)
    return Profile(store.manifest.model, store_digest(store), (text,), 2, watched, tuple(layers), no_text)


def _planned(store: Store, request: SpreadRequest, profile: Profile | None, say: Say, extra_bytes: int = 0) -> Spread:
    """profile: None for the one that lies beside the store."""
    gpu = SIMULATED_GPU if request.is_simulated and request.vram_bytes else None
    working = tier_working_bytes(store.manifest.config, store.manifest.quantization.weights)
    planner = make_planner(
        store,
        beside(store, request.cache_dir) / PROFILE_FOLDER,
        request.predictors,
        mode=None if request.predictors is not None else request.mode,
        num_positions=request.num_positions,
        kv_dtype=request.kv_dtype,
        num_threads=request.num_threads,
        gpu_name=gpu,
        cache_dir=request.cache_dir,
        say=say,
        program_bytes=request.program_bytes + working + request.extra_bytes + extra_bytes,
        profile=profile,
    )
    plan, tiers = planner.plan(request.vram_bytes, request.ram_bytes, allow_disk=True)
    speed = f", as {KNOWN_GPUS[gpu].name} would" if gpu else ""
    say(f"neurons: {where_neurons_are(plan)}; expected {plan.tokens_per_s:.1f} tokens/s{speed}")
    return Spread(plan, tiers)


def where_neurons_are(plan: Plan) -> str:
    """In words."""
    names = {"gpu": "on the GPU", "ram": "in RAM", "disk": "on disk"}
    return ", ".join(f"{format_bytes(size)} {names[tier]}" for tier, size in plan.neuron_bytes.items() if size)


def _kept(store: Store, folder: Path, profile_folder: Path) -> Spread | None:
    """What an earlier run left; None where it is not there or damaged, or follows from what is past."""
    try:
        plan, tiers = read_plan(folder, store.manifest.config, store_digest(store))
    except CheckpointError:
        return None
    is_newer = (folder / PLAN).stat().st_mtime_ns >= (profile_folder / PROFILE).stat().st_mtime_ns
    return Spread(plan, tiers) if is_newer else None
