"""Making a profile: windows of text through the exact model, counted and sampled, resumable after a kill.

Every HELD_OUT_EVERY-th window is not computed but kept as tokens, up to MOST_HELD_OUT, to test on later what is made
from the rest. The state is saved every SAVE_EVERY_S seconds; a run that is killed and started again redoes what came
after, gives the sampled tokens the same slots again, and so ends with the same files as one that never stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import filelock
import numpy as np
import torch

from hybrid_runtime.budget import PREFILL_BATCH
from hybrid_runtime.errors import CheckpointError, UsageError
from hybrid_runtime.generation.sequence import TokenSequence
from hybrid_runtime.profiling.counting import FiringCounter
from hybrid_runtime.profiling.profile import LayerCounts, Profile, TextDigest, empty_layers, watched_neurons
from hybrid_runtime.profiling.profile_file import (
    expected_layers,
    has_profile,
    layer_tensors,
    layers_of,
    read_header,
    read_profile,
    samples_path,
    write_counts,
)
from hybrid_runtime.profiling.samples import Reservoir, SampleFile, SampleShape, WindowSampler, token_priorities
from hybrid_runtime.profiling.windows import require_windows, text_digest, token_windows
from hybrid_runtime.store.beside import store_digest
from hybrid_runtime.store.reader import Store
from hybrid_runtime.tensor_files import read_metadata, read_tensors, write_tensors
from hybrid_runtime.text.tokenizer import Tokenizer

HELD_OUT_EVERY = 16
MOST_HELD_OUT = 32
SAVE_EVERY_S = 20.0
WORK = "work"
STATE = "state.safetensors"
RAW_SAMPLES = "samples.raw"
LOCK = ".lock"

OnWindow = Callable[[int], None]
"""Gets the number of tokens that were counted so far."""


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
        if len(set(self.files)) < len(self.files):
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
) -> tuple[Profile, bool]:
    """The profile of the request, and whether it was there already. It is left in folder.

    sequence: the model in its exact mode, with a context of at least one window. Raises UsageError when another run
    writes there, or one with other settings is unfinished.
    """
    config = store.manifest.config
    identity = _identity(store, request)
    data = f"data-{hashlib.sha256((identity + str(request.num_tokens)).encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / LOCK, timeout=0):
            if not request.restarts and has_profile(folder) and read_header(folder).data == data:
                return read_profile(folder, config, store_digest(store)), True
            run = _Run(store, sequence, request, folder, identity)
            run.count(tokenizer, on_window)
            run.finish(data)
    except filelock.Timeout as error:
        raise UsageError(f"{folder}: another run writes its profile here; wait for it") from error
    return read_profile(folder, config, store_digest(store)), False


class _Run:
    """One run's files and state."""

    def __init__(
        self, store: Store, sequence: TokenSequence, request: ProfileRequest, folder: Path, identity: str
    ) -> None:
        self._store = store
        self._sequence = sequence
        self._request = request
        self._folder = folder
        self._identity = identity
        self._config = store.manifest.config
        self._work = folder / WORK
        if request.restarts:
            shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(exist_ok=True)
        self._watched = watched_neurons(self._config)
        self._shape = SampleShape.of(self._config)
        self._state = self._resumed() if (self._work / STATE).exists() else self._fresh()
        self._samples = SampleFile(self._work / RAW_SAMPLES, self._shape, self._state.reservoir.num_slots)

    def count(self, tokenizer: Tokenizer, on_window: OnWindow) -> None:
        """Count every window that is not counted yet; what was counted is saved also when this is interrupted."""
        request = self._request
        saved_s = time.monotonic()
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
        except KeyboardInterrupt:
            self._save()
            raise
        require_windows(self._state.num_windows, request.files, request.window)

    def finish(self, data: str) -> None:
        """Sort the sample, write everything in its lasting form, forget the work."""
        state = self._state
        self._samples.flush()
        priorities = state.reservoir.priorities()
        order = np.argsort(priorities, kind="stable")
        (self._folder / data).mkdir(exist_ok=True)
        for layer_idx in range(self._config.num_hidden_layers):
            rows = self._samples.read(layer_idx, len(order))[order]
            tensors = {name: torch.from_numpy(rows[name].copy()) for name in ("inputs", "experts", "active")}
            tensors["priorities"] = torch.from_numpy(priorities[order])
            write_tensors(samples_path(self._folder / data, layer_idx), tensors, {})
        text = TextDigest(text_digest(self._request.files), state.num_counted)
        manifest = self._store.manifest
        profile = Profile(
            manifest.model,
            store_digest(self._store),
            (text,),
            self._request.window,
            self._watched,
            state.layers,
            state.held_out,
        )
        write_counts(self._folder, profile, len(order), data)
        self._samples.close()
        shutil.rmtree(self._work)

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
            decoder.forward(batch, cache, prompt_end=len(tokens), observer=counter)
            counter.finish()
        sampler.write()
        total = tuple(before + now for before, now in zip(state.layers, layers, strict=True))
        return _State(idx + 1, state.num_counted + len(tokens), total, reservoir, state.held_out)

    def _save(self) -> None:
        state = self._state
        self._samples.flush()
        tensors = layer_tensors(state.layers)
        tensors |= {"priorities": torch.from_numpy(state.reservoir.priorities()), "held_out": state.held_out}
        values = {"identity": self._identity, "windows": state.num_windows, "counted": state.num_counted}
        write_tensors(self._work / STATE, tensors, {"run": json.dumps(values)})

    def _fresh(self) -> _State:
        slots = self._shape.rows_in(self._request.sample_bytes)
        held_out = torch.zeros(0, self._request.window, dtype=torch.int32)
        return _State(0, 0, empty_layers(self._config, len(self._watched)), Reservoir(slots), held_out)

    def _resumed(self) -> _State:
        path = self._work / STATE
        remedy = "give --restart to begin anew"
        values = json.loads(read_metadata(path, remedy).get("run", "{}"))
        if values.get("identity") != self._identity:
            raise UsageError(
                f"{self._work}: holds an unfinished profile of another text, another --window or another --samples, "
                f"or of the model as it was; {remedy}, or finish that one with its own options"
            )
        expected = {
            **expected_layers(self._config),
            "priorities": ((None,), torch.int64),
            "held_out": ((None, self._request.window), torch.int32),
        }
        tensors = read_tensors(path, expected, remedy)
        if not (self._work / RAW_SAMPLES).exists():
            raise CheckpointError(f"{self._work / RAW_SAMPLES}: is missing; {remedy}")
        slots = self._shape.rows_in(self._request.sample_bytes)
        reservoir = Reservoir(slots, tensors["priorities"].numpy())
        layers = layers_of(tensors, self._config.num_hidden_layers)
        return _State(values["windows"], values["counted"], layers, reservoir, tensors["held_out"])


def _identity(store: Store, request: ProfileRequest) -> str:
    """Names what a run may be resumed with; the number of tokens is not part of it, since more may be asked for."""
    parts = (store_digest(store), text_digest(request.files), request.window, request.sample_bytes)
    return hashlib.sha256(repr(parts).encode()).hexdigest()
