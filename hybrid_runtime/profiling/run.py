"""Making a profile: windows of text through the exact model, counted and sampled, resumable after a kill.

Every HELD_OUT_EVERY-th window is not computed but kept as tokens, up to MOST_HELD_OUT, to test on later what is made
from the rest. The state is saved every SAVE_EVERY_S seconds; a run that is killed and started again redoes what came
after, gives the sampled tokens the same slots again, and so ends with the same files as one that never stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import filelock
import numpy as np
import torch

from hybrid_runtime.budget import PREFILL_BATCH
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import CheckpointError, NumericsError, UsageError
from hybrid_runtime.generation.sequence import TokenSequence
from hybrid_runtime.profiling.counting import FiringCounter
from hybrid_runtime.profiling.profile import (
    LAYER_FIELDS,
    LayerCounts,
    Profile,
    TextDigest,
    empty_layers,
    watched_neurons,
)
from hybrid_runtime.profiling.profile_file import (
    expected_layers,
    has_profile,
    layer_tensors,
    layers_of,
    read_header,
    read_profile,
    read_samples,
    remove_other_data,
    samples_path,
    write_counts,
)
from hybrid_runtime.profiling.replacing import require_larger
from hybrid_runtime.profiling.samples import (
    PRIORITY_BYTES,
    Reservoir,
    SampleFile,
    SampleShape,
    WindowSampler,
    require_disk,
    token_priorities,
)
from hybrid_runtime.profiling.windows import require_windows, text_digest, token_windows
from hybrid_runtime.progress import NoProgress, Progress
from hybrid_runtime.store.beside import store_digest
from hybrid_runtime.store.reader import Store
from hybrid_runtime.strict_json import parse_json_object
from hybrid_runtime.tensor_files import read_metadata, read_tensors, remove_abandoned, write_tensors
from hybrid_runtime.text.tokenizer import Tokenizer
from hybrid_runtime.typed_json import from_json
from hybrid_runtime.whole_files import TEMPORARY

HELD_OUT_EVERY = 16
MOST_HELD_OUT = 32
SAVE_EVERY_S = 20.0
WORK = "work"
STATE = "state.safetensors"
RAW_SAMPLES = "samples.raw"
LOCK = ".lock"
RESTART = "give --restart to begin anew"
COPIED_COUNTS = 5  # the state, the one on disk, the window's, their sum, and what is written
COPIED_ROWS = 3  # of a layer of the sample: as they were sampled, sorted, and as they are written
COPIED_PRIORITIES = 6  # before and after a window, side by side, their order
BLOCK_BYTES = 512  # what st_blocks counts
MOST_UNPACKED = 1032  # bytes of text in a byte of gzip

OnWindow = Callable[[int], None]
"""Gets the number of tokens that were counted so far; first of all, before any window, those of an earlier run."""


@dataclass(frozen=True, slots=True)
class ProfileRequest:
    """files: the text; num_tokens: how many to count, None: all; window: tokens that one looks back on, its own
    included; sample_bytes: what the sample may take on disk; restarts: forget an unfinished run, and a finished one.
    """

    files: tuple[Path, ...]
    num_tokens: int | None
    window: int
    sample_bytes: int
    restarts: bool = False

    def __post_init__(self) -> None:
        """Raise UsageError for counts that mean nothing."""
        if self.num_tokens is not None and self.num_tokens < self.window:
            raise UsageError(f"--tokens {self.num_tokens}: is less than one window of {self.window} (see --window)")
        if len({path.resolve() for path in self.files}) < len(self.files):
            raise UsageError("--text: a file is named twice, which would count it twice; leave one out")


@dataclass(frozen=True, slots=True)
class _State:
    """A run between two windows. num_windows: read so far, held-out ones included; held_out: int32 [n, window].

    A window makes a new one of it, in one assignment: whenever a run is interrupted, the state that it has is whole.
    """

    num_windows: int
    num_counted: int
    layers: tuple[LayerCounts, ...]
    reservoir: Reservoir
    held_out: torch.Tensor


def make_profile(
    store: Store,
    sequence: TokenSequence,
    tokenizer: Tokenizer,
    request: ProfileRequest,
    folder: Path,
    on_window: OnWindow,
    progress: Progress | None = None,
) -> tuple[Profile, bool]:
    """The profile of the request, and whether it was there already. It is left in folder.

    sequence: the model in its exact mode, with a context of at least one window. progress: of the steps before and
    after the windows. Raises UsageError when another run writes there, one with other settings is unfinished, or a
    larger profile is there; BudgetError, before any window, where the disk has no room for the sample.
    """
    progress = progress or NoProgress()
    text = text_digest(request.files, progress)
    data = _data_name(store, request, text)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / LOCK, timeout=0):
            if not request.restarts and (profile := _finished(store, folder, data, text, progress)) is not None:
                _tidy(folder)
                return profile, True
            if request.restarts:
                _forget(folder / WORK)
            elif not (folder / WORK / STATE).exists():  # else it was asked when that run began
                require_larger(folder, store_digest(store), _most_tokens(request))
            _tidy(folder)
            run = _Run(store, sequence, request, folder, data)
            try:
                run.count(tokenizer, on_window)
                run.finish(text, progress)
            finally:
                progress.done()
                run.close()
            _tidy(folder)
    except filelock.Timeout as error:
        raise UsageError(f"{folder}: another run writes its profile here; wait for it") from error
    return read_profile(folder, store.manifest.config, store_digest(store)), False


def _finished(store: Store, folder: Path, data: str, text: str, progress: Progress) -> Profile | None:
    """The folder's profile, if it is this one and all of it is sound; one that is damaged is made again."""
    config = store.manifest.config
    try:
        if not has_profile(folder) or read_header(folder).data != data:
            return None
        progress.start("checking the profile that is there", config.num_hidden_layers, "layers")
        for layer_idx in range(config.num_hidden_layers):
            read_samples(folder, config, layer_idx)
            progress.advance(1)
        profile = read_profile(folder, config, store_digest(store))
    except CheckpointError:
        return None
    finally:
        progress.done()
    return profile if [each.sha256 for each in profile.texts] == [text] else None


def _tidy(folder: Path) -> None:
    """Away with what a run that was killed at its very end left: its own work, and the data before it."""
    work, state = folder / WORK, folder / WORK / STATE
    try:
        finished = read_header(folder).data if has_profile(folder) else None
        if state.exists() and _read_progress(state).data == finished:
            state.unlink()
    except CheckpointError:
        return  # whoever reads it says what is wrong with it
    if not state.exists():  # what else is there means nothing without it
        _forget(work)
    if finished is not None:
        remove_other_data(folder, finished)


def _forget(work: Path) -> None:
    """Away with an unfinished run, its state first. Only what a run writes: the folder may have been somebody's."""
    (work / STATE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        for name in (STATE + TEMPORARY, RAW_SAMPLES):
            (work / name).unlink(missing_ok=True)
        remove_abandoned(work)
        work.rmdir()


class _Run:
    """One run's files and state."""

    def __init__(self, store: Store, sequence: TokenSequence, request: ProfileRequest, folder: Path, data: str) -> None:
        self._store = store
        self._sequence = sequence
        self._request = request
        self._folder = folder
        self._data = data
        self._config = store.manifest.config
        self._work = folder / WORK
        self._work.mkdir(exist_ok=True)
        self._watched = watched_neurons(self._config)
        self._shape = SampleShape.of(self._config)
        self._state = self._resumed() if (self._work / STATE).exists() else self._fresh()
        self._saved = self._state
        self._require_disk()
        self._samples = SampleFile(self._work / RAW_SAMPLES, self._shape, self._state.reservoir.num_slots)

    def count(self, tokenizer: Tokenizer, on_window: OnWindow) -> None:
        """Count every window that is not counted yet; what was counted is saved also when this is interrupted."""
        request = self._request
        saved_s = time.monotonic()
        on_window(self._state.num_counted)
        try:
            for idx, tokens in enumerate(token_windows(request.files, tokenizer, request.window)):
                if request.num_tokens is not None and self._state.num_counted >= request.num_tokens:
                    break
                if idx < self._state.num_windows:
                    continue
                self._state = self._after(tokens, idx)
                on_window(self._state.num_counted)
                if time.monotonic() - saved_s >= SAVE_EVERY_S:
                    self._save()
                    saved_s = time.monotonic()
            require_windows(self._state.num_windows, request.files, request.window)
            self._save()  # what comes after may be interrupted too
        except KeyboardInterrupt:
            self._save()
            raise

    def finish(self, text: str, progress: Progress) -> None:
        """Sort the sample and write everything in its lasting form. text: its digest."""
        state = self._state
        priorities = state.reservoir.priorities()
        order = np.argsort(priorities, kind="stable")
        data = self._folder / self._data
        data.mkdir(exist_ok=True)
        progress.start("writing the sample", self._config.num_hidden_layers, "layers")
        for layer_idx in range(self._config.num_hidden_layers):
            rows = self._samples.read(layer_idx, len(order))
            tensors = {name: torch.from_numpy(rows[name][order]) for name in ("inputs", "experts", "active")}
            tensors["priorities"] = torch.from_numpy(priorities[order])
            del rows  # a layer of the sample may be hundreds of MB, and is copied once more when it is written
            write_tensors(samples_path(data, layer_idx), tensors, {})
            progress.advance(1)
        manifest = self._store.manifest
        profile = Profile(
            manifest.model,
            store_digest(self._store),
            (TextDigest(text, state.num_counted),),
            self._request.window,
            self._watched,
            state.layers,
            state.held_out,
        )
        write_counts(self._folder, profile, len(order), self._data)

    def close(self) -> None:
        """Close the files."""
        self._samples.close()

    def _require_disk(self) -> None:
        """Room for the raw rows and the finished ones, of which an earlier run may have left some."""
        num_tokens = min(self._state.reservoir.num_slots, _most_tokens(self._request))
        files = (self._work / RAW_SAMPLES, *(self._folder / self._data).glob("*"))
        held = sum(path.stat().st_blocks * BLOCK_BYTES for path in files if path.is_file())
        require_disk(self._folder, self._shape, num_tokens, copies=2, held_bytes=held)

    def _after(self, tokens: torch.Tensor, idx: int) -> _State:
        """The state with one window more."""
        state = self._state
        if idx % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 and len(state.held_out) < MOST_HELD_OUT:
            held_out = torch.cat([state.held_out, tokens.int().unsqueeze(0)])
            return replace(state, num_windows=idx + 1, held_out=held_out)
        reservoir, taken = state.reservoir.take(token_priorities(tokens, idx))
        sampler = WindowSampler(self._samples, taken)
        layers = empty_layers(self._config, len(self._watched))
        counter = FiringCounter(self._config, layers, self._watched, sampler.see)
        decoder, cache = self._sequence.decoder, self._sequence.cache
        cache.truncate(0)
        for start in range(0, len(tokens), PREFILL_BATCH):
            sampler.begin_batch(start)
            batch = tokens[start : start + PREFILL_BATCH]
            logits = decoder.forward(batch, cache, prompt_end=len(tokens), observer=counter)
            counter.finish()
            if not torch.isfinite(logits).all():
                raise NumericsError(
                    f"{self._store.folder}: the model computed NaN or Inf in window {idx} of the text; its weights are "
                    "damaged: convert it again"
                )
        sampler.write()
        total = tuple(before + now for before, now in zip(state.layers, layers, strict=True))
        return _State(idx + 1, state.num_counted + len(tokens), total, reservoir, state.held_out)

    def _save(self) -> None:
        state = self._state
        if state is self._saved:
            return
        self._samples.sync()
        tensors = layer_tensors(state.layers)
        tensors |= {"priorities": torch.from_numpy(state.reservoir.priorities()), "held_out": state.held_out}
        progress = _Progress(self._data, state.num_windows, state.num_counted)
        write_tensors(self._work / STATE, tensors, {"run": json.dumps(asdict(progress))})
        self._saved = state

    def _fresh(self) -> _State:
        slots = self._shape.rows_in(self._request.sample_bytes)
        held_out = torch.zeros(0, self._request.window, dtype=torch.int32)
        return _State(0, 0, empty_layers(self._config, len(self._watched)), Reservoir(slots), held_out)

    def _resumed(self) -> _State:
        path = self._work / STATE
        progress = _read_progress(path)
        if progress.data != self._data:
            raise UsageError(
                f"{self._work}: holds an unfinished profile of another text, another --tokens, --window or --samples, "
                f"or of the model as it was; {RESTART}, or finish that one with its own options"
            )
        slots = self._shape.rows_in(self._request.sample_bytes)
        expected = {
            **expected_layers(self._config, len(self._watched)),
            "priorities": ((min(slots, progress.counted),), torch.int64),
            "held_out": ((None, self._request.window), torch.int32),
        }
        tensors = read_tensors(path, expected, RESTART)
        raw, raw_bytes = self._work / RAW_SAMPLES, self._shape.raw_bytes(slots)
        if not raw.is_file():
            raise CheckpointError(f"{raw}: is missing; {RESTART}")
        if raw.stat().st_size != raw_bytes:
            raise CheckpointError(f"{raw}: has {raw.stat().st_size} bytes, expected {raw_bytes}; {RESTART}")
        reservoir = Reservoir(slots, tensors["priorities"].numpy())
        layers = layers_of(tensors, self._config.num_hidden_layers)
        return _State(progress.windows, progress.counted, layers, reservoir, tensors["held_out"])


@dataclass(frozen=True, slots=True)
class _Progress:
    """How far the state in a file is. data: the folder's name that the finished run will have, which names the run."""

    data: str
    windows: int
    counted: int


def _read_progress(path: Path) -> _Progress:
    """Raise CheckpointError for a file that is no state."""
    text = read_metadata(path, RESTART).get("run", "{}")
    try:
        return from_json(_Progress, parse_json_object(text.encode(), f"{path}: run", remedy=RESTART), "run")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; {RESTART}") from error


def _most_tokens(request: ProfileRequest) -> int:
    """No fewer than will be counted: a byte of text is a token at most, and a document begins with one or two more."""
    sizes = (path.stat().st_size * (MOST_UNPACKED if path.suffix == ".gz" else 1) for path in request.files)
    most = 2 * sum(sizes) + 2 * len(request.files)
    if request.num_tokens is None:
        return most
    return min(most, -(-request.num_tokens // request.window) * request.window)


def profiling_bytes(config: ModelConfig, request: ProfileRequest) -> int:
    """Memory that a run takes beside the model: counts, a window's rows of the sample, at the end a layer of it."""
    shape = SampleShape.of(config)
    num_slots = shape.rows_in(request.sample_bytes)
    if request.num_tokens is not None:
        num_slots = min(num_slots, request.num_tokens + request.window)
    layers = empty_layers(config, len(watched_neurons(config)))
    counts: int = sum(getattr(layer, name).nbytes for layer in layers for name in LAYER_FIELDS)
    rows = max(shape.num_layers * min(num_slots, request.window), COPIED_ROWS * num_slots) * shape.row.itemsize
    return COPIED_COUNTS * counts + rows + COPIED_PRIORITIES * num_slots * PRIORITY_BYTES


def _data_name(store: Store, request: ProfileRequest, text: str) -> str:
    """Of the folder that the profile's data go to: the same for runs that end with the same bits, for no others.

    The number of tokens is part of it: rows of the raw sample make way for those of later windows, so that a run that
    was interrupted cannot end earlier than it meant to.
    """
    parts = (store_digest(store), text, request.num_tokens, request.window, request.sample_bytes)
    return f"data-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"
