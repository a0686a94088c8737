"""The Python API: load a model by name, get text piece by piece.

    from hybrid_runtime.engine import Engine

    engine = Engine.load("stories260K-f32.gguf")
    for piece in engine.generate("Once upon a time"):
        print(piece, end="", flush=True)

The command line and (later) the server are thin callers of this class. One Engine answers one prompt at a time.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import platformdirs
import torch

from hybrid_kernels.native.load import KernelLibrary
from hybrid_kernels.team import Team
from hybrid_runtime.budget import MemoryNeeds, MemoryPlan, plan_memory, require_memory
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import BudgetError, ContextOverflow, TemplateError, UsageError
from hybrid_runtime.generation.report import GenerationReport
from hybrid_runtime.generation.sampling import SamplingParams
from hybrid_runtime.generation.sequence import Generation, TokenSequence, check_prompt
from hybrid_runtime.generation.stop import StopMatcher
from hybrid_runtime.gpu.device import GpuDevice
from hybrid_runtime.gpu.use import chosen_device, gpu_decoder, with_less_after_oom
from hybrid_runtime.load_options import LoadOptions
from hybrid_runtime.machine import (
    available_ram_bytes,
    current_rss_bytes,
    physical_cores,
    ram_limit_bytes,
    usable_cores,
)
from hybrid_runtime.model.decoder import Decoder, PredictorMode, choose_predictor_mode
from hybrid_runtime.model.kernels import needed_kernels
from hybrid_runtime.model.kv_cache import KvCache, KvDtype, check_kv_dtype
from hybrid_runtime.model.trained_predictors import load_predictors, with_predictors
from hybrid_runtime.model.weights import load_weights
from hybrid_runtime.profiling.profile_file import PROFILE_FOLDER
from hybrid_runtime.profiling.run import ProfileRequest
from hybrid_runtime.sizes import format_bytes
from hybrid_runtime.spreading import Spread, SpreadRequest, find_spread, load_spread, profile_with_progress
from hybrid_runtime.store.beside import beside, store_digest
from hybrid_runtime.store.memory import LoadMode
from hybrid_runtime.store.predictor_files import PREDICTOR_FOLDER, PredictorHeader, has_predictors, read_header
from hybrid_runtime.store.reader import Store
from hybrid_runtime.stores import ModelRequest, find_model, load_store_tokenizer
from hybrid_runtime.text.chat import Message, render_chat
from hybrid_runtime.text.tokenizer import Tokenizer
from hybrid_runtime.tiers.memory import least_memory

MOST_POSITIONS = 1 << 24
RAM_STEPS = 32  # into which the machine's memory is cut where nobody says how much a model may have
SMALLEST_SHARED_BYTES = 8 << 20
MOST_DEFAULT_POSITIONS = 4096
LEAST_DEFAULT_POSITIONS = 512  # some converters write a context of 128 whatever the model was trained with
MANY_CHARS_PER_TOKEN = 16  # prose has four
TOKENS_AT_A_CUT = 64  # by how many fewer tokens a text could have than its beginning


def default_cache_dir() -> Path:
    """Where converted models are kept when the caller names no folder."""
    return Path(platformdirs.user_cache_dir("hybrid-runtime"))


@dataclass(frozen=True, slots=True)
class TrainedPredictors:
    """Predictors that lie in a folder beside the store; not in memory yet."""

    folder: Path
    header: PredictorHeader


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A store, and all that was decided about running it. No weight is in memory yet.

    spread: where its neurons go; None: into one memory. device: the GPU, where it has some.
    """

    store: Store
    predictor_mode: PredictorMode
    num_positions: int
    kv_dtype: KvDtype
    load: LoadMode
    memory_plan: MemoryPlan
    num_threads: int
    kernels: KernelLibrary
    trained: TrainedPredictors | None = None
    spread: Spread | None = None
    device: GpuDevice | None = None

    def load_sequence(self) -> TokenSequence:
        """The decoder with its weights, and an empty context."""
        config = self.store.manifest.config
        if self.spread is None:
            weights = load_weights(self.store, self.load)
        else:
            weights = load_spread(self.store, self.spread, self.device)
        if self.trained is not None:
            config = replace(config, predictor_input=self.trained.header.input)
            predictors = load_predictors(self.trained.folder, self.trained.header, config)
            weights = with_predictors(weights, predictors)
        team, cache = Team(self.num_threads, self.kernels), KvCache(config, self.num_positions, self.kv_dtype)
        if self.device is None:
            return TokenSequence(Decoder(config, weights, self.predictor_mode, team), cache)
        return TokenSequence(gpu_decoder(config, weights, self.predictor_mode, team, self.device, cache), cache)


def open_model(request: ModelRequest, options: LoadOptions, *, needs_tokenizer: bool = True) -> OpenModel:
    """Find or make the model's store and check that it can run as asked.

    Raises a HybridError that says what to do; BudgetError before anything is converted when the memory would not do.
    """
    cache_dir = options.cache_dir or default_cache_dir()
    found = find_model(request, cache_dir, options.progress, needs_tokenizer=needs_tokenizer)
    config = found.config
    predictor_mode = choose_predictor_mode(config, options.predictor)
    num_positions = choose_num_positions(config, options.num_positions)
    kv_dtype = options.kv_dtype or ("f32" if found.weights.kind == "f32" else "f16")
    check_kv_dtype(config, kv_dtype)
    device = chosen_device(config, options)
    needs = MemoryNeeds(
        weights_bytes=found.num_bytes,
        num_positions=num_positions,
        kv_dtype=kv_dtype,
        scores=options.scores,
        largest_converted_bytes=found.largest_converted_bytes,
    )
    plan = plan_memory(config, needs, current_rss_bytes())
    extra_bytes = options.extra_bytes + (0 if device is None else device.host_bytes)
    plan = replace(plan, workspace=plan.workspace + extra_bytes)
    least = least_memory(plan, config, found.weights)
    can_spread = options.spreads and (options.vram_bytes > 0 or fits_memory(least, options.ram_bytes))
    spreads = can_spread and (options.vram_bytes > 0 or not fits_memory(plan, options.ram_bytes))
    if not spreads:
        require_memory(plan, options.ram_bytes, available_ram_bytes(), least if options.spreads else None)
    elif needs.largest_converted_bytes:  # the rest is refused when it is planned, with its numbers
        require_memory(replace(plan, weights=0, kv_cache=0, workspace=0), options.ram_bytes, available_ram_bytes())
    if num_positions > max(config.max_position_embeddings, LEAST_DEFAULT_POSITIONS):
        options.say(f"--ctx {num_positions}: the model was made for {config.max_position_embeddings} tokens")
    store = found.open(options.progress, options.say)
    trained = None
    if predictor_mode == "trained":
        trained = find_predictors(store, cache_dir)
        plan = replace(plan, weights=plan.weights + trained.header.num_bytes)
        spreads = spreads or (can_spread and not fits_memory(plan, options.ram_bytes))
        if not spreads:
            require_memory(plan, options.ram_bytes, available_ram_bytes())
    num_threads = options.threads or default_threads(store.num_bytes)
    kernels = KernelLibrary(options.say)
    rows = None if trained is None else trained.header.row_format
    kernels.prepare(needed_kernels(config, store.manifest.quantization, rows, tiered=spreads))
    opened = OpenModel(
        store, predictor_mode, num_positions, kv_dtype, options.load, plan, num_threads, kernels, trained, device=device
    )
    return _spread_out(opened, replace(options, extra_bytes=extra_bytes), cache_dir) if spreads else opened


def _loaded(request: ModelRequest, options: LoadOptions) -> tuple[OpenModel, TokenSequence]:
    opened = open_model(request, options)
    return opened, opened.load_sequence()


def fits_memory(plan: MemoryPlan, ram_bytes: int | None) -> bool:
    """Whether the plan's peak is within --ram, and within what the machine can give."""
    within_budget = ram_bytes is None or plan.total <= ram_bytes
    return within_budget and plan.total - plan.program <= available_ram_bytes()


def _spread_out(opened: OpenModel, options: LoadOptions, cache_dir: Path) -> OpenModel:
    """The same with a place for every neuron. Raise BudgetError where the budgets do not hold what must be held."""
    store = opened.store
    vram_bytes = options.vram_bytes
    if opened.device is not None:
        vram_bytes = opened.device.available_bytes(vram_bytes, options.say)
    in_ram = vram_bytes if options.simulates_gpu else 0
    free_bytes = available_ram_bytes() + opened.memory_plan.program - in_ram
    if options.ram_bytes is None and free_bytes <= 0:
        raise BudgetError(
            f"--vram {format_bytes(in_ram)}, simulated in RAM: {format_bytes(available_ram_bytes())} of it are free; "
            "give less"
        )
    if opened.load == "mmap":
        options.say("--load mmap: neurons are spread over memories, so that all that stays is read")
    request = SpreadRequest(
        vram_bytes=vram_bytes,
        ram_bytes=_whole_steps(free_bytes) if options.ram_bytes is None else options.ram_bytes,
        is_simulated=options.vram_bytes > 0 and (opened.device is None or not opened.device.is_cuda),
        num_positions=opened.num_positions,
        kv_dtype=opened.kv_dtype,
        mode=opened.predictor_mode,
        predictors=None if opened.trained is None else opened.trained.header,
        num_threads=opened.num_threads,
        cache_dir=cache_dir,
        program_bytes=opened.memory_plan.program,
        extra_bytes=options.extra_bytes,
        profiles=options.profiles,
        has_device=opened.device is not None,
    )

    def profile(spread: Spread, asked: ProfileRequest) -> None:
        sequence = replace(opened, spread=spread, device=None).load_sequence()
        tokenizer, _ = load_store_tokenizer(store)
        folder = beside(store, cache_dir) / PROFILE_FOLDER
        profile_with_progress(store, sequence, tokenizer, asked, folder, options.progress)

    spread = find_spread(store, request, profile, options.say)
    memory = spread.memory_plan(store.manifest, request)
    require_memory(memory, options.ram_bytes, available_ram_bytes() - (spread.simulated_bytes if in_ram else 0))
    return replace(opened, spread=spread, memory_plan=memory)


def _whole_steps(free_bytes: int) -> int:
    """So much of what is free that the next run plans for the same, though a little more or less is free then."""
    limit = ram_limit_bytes()
    step = max(1, limit // RAM_STEPS)
    return min(free_bytes, limit) // step * step


def find_predictors(store: Store, cache_dir: Path) -> TrainedPredictors:
    """Those that were trained for the store. Raise UsageError where there are none, CheckpointError for broken ones."""
    folder = beside(store, cache_dir) / PREDICTOR_FOLDER
    if not has_predictors(folder):
        name = store.manifest.model
        raise UsageError(
            f"--predictor trained: nobody has trained predictors for {name} yet; run hybrid-profile and "
            f"hybrid-predictors train, or choose another --predictor"
        )
    return TrainedPredictors(folder, read_header(folder, store.manifest.config, store_digest(store)))


class Engine:
    """A loaded model with its tokenizer and one sequence of tokens, whose KV cache is kept from prompt to prompt."""

    def __init__(
        self,
        store: Store,
        sequence: TokenSequence,
        tokenizer: Tokenizer,
        chat_template: str | None,
        plan: MemoryPlan,
        spread: Spread | None = None,
    ) -> None:
        self.store = store
        self.spread = spread
        self.sequence = sequence
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.memory_plan = plan
        self.last_report: GenerationReport | None = None

    @classmethod
    def load(cls, model: str | ModelRequest, options: LoadOptions | None = None) -> Engine:
        """Find or make the model's store and read it into memory.

        model: a path, an alias or a repository id; a ModelRequest for more say. Raises a HybridError that says what to
        do; BudgetError before any weight is read when the memory would not do.
        """
        request = ModelRequest(model) if isinstance(model, str) else model
        opened, sequence = with_less_after_oom(options or LoadOptions(), lambda options: _loaded(request, options))
        tokenizer, chat_template = load_store_tokenizer(opened.store)
        return cls(opened.store, sequence, tokenizer, chat_template, opened.memory_plan, opened.spread)

    @property
    def config(self) -> ModelConfig:
        """The model's description."""
        return self.store.manifest.config

    @property
    def simulated_bytes(self) -> int:
        """Of this process's memory, what stands for a GPU's: weights, and keys and values as far as there are any."""
        tiering = self.sequence.decoder.weights.tiering
        if tiering is None or self.spread is None or self.sequence.decoder.is_on_cuda:
            return 0
        on_gpu = {part.kind: part.num_bytes for part in self.spread.plan.parts if part.device == "gpu"}
        cache, mode = self.sequence.cache, self.sequence.decoder.predictor_mode
        beside = on_gpu.get("predictors", 0) if mode == "trained" else 0
        return tiering.gpu_bytes + beside + on_gpu.get("KV cache", 0) * cache.length // cache.num_positions

    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, parse_special: bool = False
    ) -> Generator[str, None, None]:
        """Continue a text, or token ids. Yields text as soon as it is certain: whole characters, no stop string.

        parse_special: whether control tokens written in the text count as such. `last_report` is set when the iteration
        ends or is left.
        """
        ids = self.encode(prompt, parse_special=parse_special) if isinstance(prompt, str) else list(prompt)
        return self._answer(ids, params or SamplingParams())

    def chat(
        self, messages: Sequence[Message | Mapping[str, object]], params: SamplingParams | None = None
    ) -> Generator[str, None, None]:
        """Answer a conversation with the model's own template. What an earlier turn computed is not computed again."""
        return self._answer(self.encode_chat(messages), params or SamplingParams())

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of a prompt; an empty one is the beginning-of-sequence token alone."""
        self._refuse_endless(text)
        ids = self.tokenizer.encode(text, parse_special=parse_special)
        if not ids and self.tokenizer.bos_id is not None:
            return [self.tokenizer.bos_id]
        return ids

    def encode_chat(self, messages: Sequence[Message | Mapping[str, object]]) -> list[int]:
        """Token ids of a conversation. Raises TemplateError without a template, or when it refuses the messages."""
        if self.chat_template is None:
            raise TemplateError(f"{self.store.manifest.model} has no chat template; use it to continue a text instead")
        text = render_chat(
            self.chat_template,
            messages,
            bos_token=self._token_text(self.tokenizer.bos_id),
            eos_token=self._token_text(self.tokenizer.eos_id),
        )
        self._refuse_endless(text)
        return self.tokenizer.encode(text, add_special=False, parse_special=True)

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """tokens: one whole sequence -> float32 [T, V]: what the model expects after each. Starts the context anew."""
        return torch.cat(list(self.logit_batches(tokens)))

    def logit_batches(self, tokens: Sequence[int]) -> Iterator[torch.Tensor]:
        """The same as `logits`, in batches of rows, because all of them take more memory than many models."""
        return self.sequence.score(check_prompt(tokens, self.sequence))

    def _refuse_endless(self, text: str) -> None:
        """Raise ContextOverflow for a text whose beginning alone fills the context, without cutting all of it."""
        num_positions = self.sequence.cache.num_positions
        beginning = text[: (num_positions + TOKENS_AT_A_CUT) * MANY_CHARS_PER_TOKEN]
        if len(beginning) < len(text):
            num_tokens = len(self.tokenizer.encode(beginning, parse_special=True))
            if num_tokens > num_positions + TOKENS_AT_A_CUT:
                raise ContextOverflow(
                    f"the prompt's first {len(beginning)} of {len(text)} characters are {num_tokens} tokens already, "
                    f"the context holds {num_positions}; shorten it or give a larger --ctx"
                )

    def _answer(self, ids: Sequence[int], params: SamplingParams) -> Generator[str, None, None]:
        end_ids = self.tokenizer.end_ids | set(self.config.eos_token_ids)
        generation = Generation(self.sequence, ids, params, end_ids, self.tokenizer.vocab_size)
        return self._pieces(generation, ids, StopMatcher(params.stop))

    def _pieces(
        self, generation: Generation, prompt: Sequence[int], matcher: StopMatcher
    ) -> Generator[str, None, None]:
        stream = self.tokenizer.stream(after=prompt)
        tokens = generation.__iter__()
        try:
            for token in tokens:
                piece = matcher.push(stream.push(token))
                if piece:
                    yield piece
                if matcher.stopped:
                    generation.stop()
                    return
            rest = matcher.push(stream.flush()) + matcher.flush()
            if rest:
                yield rest
        finally:
            tokens.close()
            self.last_report = generation.report

    def _token_text(self, token_id: int | None) -> str:
        return "" if token_id is None else self.tokenizer.token_of(token_id) or ""


def default_threads(weights_bytes: int) -> int:
    """The physical cores that this process may use; one for a model that a core's own caches hold.

    Threads of such a small one would meet every few microseconds, and lose milliseconds whenever one of them has to
    wait for a core that another process uses.
    """
    return 1 if weights_bytes < SMALLEST_SHARED_BYTES else min(physical_cores(), usable_cores())


def choose_num_positions(config: ModelConfig, wanted: int | None) -> int:
    """The context's size in tokens; None asks for the model's. Raise UsageError for one that it cannot have."""
    trained = config.max_position_embeddings
    if wanted is not None:
        if not 1 <= wanted <= MOST_POSITIONS:
            raise UsageError(f"--ctx {wanted}: expected 1 to {MOST_POSITIONS} tokens")
        if config.learned_position_offset is not None and wanted > trained:
            raise UsageError(f"--ctx {wanted}: the model has learned positions for only {trained} tokens")
        return wanted
    if config.learned_position_offset is not None:
        return min(trained, MOST_DEFAULT_POSITIONS)
    return min(max(trained, LEAST_DEFAULT_POSITIONS), MOST_DEFAULT_POSITIONS)
