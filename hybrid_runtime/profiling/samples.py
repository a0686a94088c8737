"""A uniform sample of tokens with what predictors learn from: their inputs, and which neurons then fired.

Each token draws a priority from its window's tokens and its place; the sample is those with the smallest priorities.
So it does not depend on the order of events, a resumed run draws the same one, and samples of two texts merge into a
sample of both. While a profile runs, rows lie in a raw file by slot; at the end they are sorted by priority into
safetensors:

    priorities               int64 [n], ascending
    layers.<l>.inputs        float16 [n, H], where the predictors read the stream
    layers.<l>.experts       int16 [n, k], to which experts the token went, ascending; k = 1 and 0 in a dense layer
    layers.<l>.active        uint8 [n, k, I / 8], bit i % 8 (lowest first) of byte i / 8 is neuron i of that expert
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import BudgetError
from hybrid_runtime.model.observer import FfnPass
from hybrid_runtime.sizes import format_bytes

LARGEST_FLOAT16 = 65504.0
PRIORITY_BYTES = 8
FILE_HEADER_BYTES = 512  # at most, of a safetensors file with a layer of the sample


@dataclass(frozen=True, slots=True)
class SampleShape:
    """What one sampled token takes on disk."""

    num_layers: int
    hidden_size: int
    num_neurons: int
    num_slots: int  # experts a token

    @staticmethod
    def of(config: ModelConfig) -> SampleShape:
        """The shape of this model's samples."""
        slots = config.num_experts_per_tok if config.num_experts else 1
        return SampleShape(config.num_hidden_layers, config.hidden_size, config.intermediate_size, slots)

    @property
    def active_bytes(self) -> int:
        """Of one expert's active set."""
        return -(-self.num_neurons // 8)

    @property
    def row(self) -> np.dtype[np.void]:
        """One token in one layer."""
        return np.dtype(
            [
                ("inputs", "<f2", (self.hidden_size,)),
                ("experts", "<i2", (self.num_slots,)),
                ("active", "u1", (self.num_slots, self.active_bytes)),
            ]
        )

    def rows_in(self, num_bytes: int) -> int:
        """How many tokens fit; every layer's file has the priorities."""
        room = num_bytes - self.num_layers * FILE_HEADER_BYTES
        return max(0, room) // (self.num_layers * (self.row.itemsize + PRIORITY_BYTES))

    def raw_bytes(self, num_slots: int) -> int:
        """Length of the raw file."""
        return self.num_layers * num_slots * self.row.itemsize


def require_disk(folder: Path, shape: SampleShape, num_tokens: int, *, copies: int, held_bytes: int = 0) -> None:
    """Raise BudgetError, before anything is computed, where the disk has no room for a sample of so many tokens.

    copies: how often it lies there until it is finished; held_bytes: what of it is there already.
    """
    needed = copies * num_tokens * shape.num_layers * (shape.row.itemsize + PRIORITY_BYTES) - held_bytes
    free = shutil.disk_usage(folder).free
    if needed > free:
        most = (free + held_bytes) // copies >> 20
        raise BudgetError(
            f"{folder}: the sample takes {format_bytes(needed)} until it is finished, the disk has "
            f"{format_bytes(free)} free; make room, give at most --samples {most}M, or another -o DIR"
        )


def token_priorities(tokens: torch.Tensor, window_idx: int) -> np.ndarray:
    """int64 [T] from 0 to 2**63 - 1, for the tokens of one window."""
    digest = hashlib.sha256(tokens.numpy().astype("<i4").tobytes() + window_idx.to_bytes(8, "little")).digest()
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    return (generator.random_raw(len(tokens)) >> np.uint64(1)).astype(np.int64)


class Reservoir:
    """Which tokens are in the sample, and in which slot of the raw file. Never changes; `take` makes the next one."""

    def __init__(self, num_slots: int, priorities: np.ndarray | None = None) -> None:
        """priorities: int64 [n <= num_slots], by slot."""
        self.num_slots = num_slots
        self._priorities = np.zeros(0, dtype=np.int64) if priorities is None else priorities

    def take(self, priorities: np.ndarray) -> tuple[Reservoir, dict[int, int]]:
        """Let a window's tokens in: the next reservoir, and index in the window to slot of those that are in it."""
        count = len(self._priorities)
        together = np.concatenate([self._priorities, priorities])
        kept = np.zeros(len(together), dtype=bool)
        kept[np.argsort(together, kind="stable")[: self.num_slots]] = True  # who came first stays, of equal ones
        taken = np.flatnonzero(kept[count:])
        new_slots = np.arange(count, int(kept.sum()))
        freed = np.flatnonzero(~kept[:count])
        slots = np.concatenate([freed, new_slots])
        after = np.concatenate([self._priorities, np.zeros(len(new_slots), dtype=np.int64)])
        after[slots] = priorities[taken]
        return Reservoir(self.num_slots, after), dict(zip(taken.tolist(), slots.tolist(), strict=True))

    def priorities(self) -> np.ndarray:
        """int64 [n], by slot."""
        return self._priorities


class SampleFile:
    """The raw file: a stretch for each layer, in it a row for each slot. Grows sparsely, where rows are written.

    Raises BudgetError where the disk has no room.
    """

    def __init__(self, path: Path, shape: SampleShape, num_slots: int) -> None:
        self.path = path
        self.shape = shape
        self.num_slots = num_slots
        path.touch()
        self._file = path.open("r+b", buffering=0)  # so that a full disk is told by the write, not by a later one
        with self._naming_the_file():
            self._file.truncate(shape.raw_bytes(num_slots))

    def write(self, layer_idx: int, slots: list[int], rows: np.ndarray) -> None:
        """rows: [n] of shape.row."""
        with self._naming_the_file():
            for slot, row in zip(slots, rows, strict=True):
                self._file.seek((layer_idx * self.num_slots + slot) * row.nbytes)
                left = memoryview(row.tobytes())
                while left:
                    left = left[self._file.write(left) :]

    def read(self, layer_idx: int, count: int) -> np.ndarray:
        """The first slots of a layer, as [count] of shape.row."""
        rows = np.empty(count, dtype=self.shape.row)
        self._file.seek(layer_idx * self.num_slots * rows.itemsize)
        left = memoryview(rows).cast("B")  # type: ignore[arg-type]  # an array is a buffer; its stubs forget records
        while left:
            num_bytes = self._file.readinto(left)
            assert num_bytes, "the file was made as long as this"
            left = left[num_bytes:]
        return rows

    def sync(self) -> None:
        """Wait until the disk has everything: a state that names rows must not outlive them in a power cut."""
        with self._naming_the_file():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BudgetError(
                f"{self.path}: could not be written: {error.strerror or error}; make room, or ask for fewer --samples, "
                "and run again"
            ) from error


class WindowSampler:
    """Collects the rows of one window's sampled tokens, and writes them when the window is over.

    A window goes through the decoder in batches: `begin_batch` says where the next one starts.
    """

    def __init__(self, file: SampleFile, taken: dict[int, int]) -> None:
        """taken: index in the window to slot."""
        self._file = file
        self._taken = sorted(taken.items())
        shape = (file.shape.num_layers, len(taken))
        self._rows = np.zeros(shape, dtype=file.shape.row)
        self._filled = np.zeros(shape, dtype=np.int64)  # experts that a row has so far
        self._start = 0

    def begin_batch(self, start: int) -> None:
        """start: index in the window of the batch's first token."""
        self._start = start

    def see(self, ffn: FfnPass, active: torch.Tensor) -> None:
        """active: bool [n, I], of the pass's tokens. Experts come in ascending order."""
        place = {token: idx for idx, token in enumerate(self._tokens(ffn, len(active)))}
        chosen = [(row, place[token]) for row, (token, _) in enumerate(self._taken) if token in place]
        if not chosen:
            return
        rows, tokens = (list(each) for each in zip(*chosen, strict=True))
        layer = self._rows[ffn.layer_idx]
        slots = self._filled[ffn.layer_idx, rows]
        inputs = ffn.predictor_input[tokens].clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16)
        layer["inputs"][rows] = inputs.numpy()
        layer["experts"][rows, slots] = ffn.expert_idx
        layer["active"][rows, slots] = np.packbits(active[tokens].numpy(), axis=1, bitorder="little")
        self._filled[ffn.layer_idx, rows] += 1

    def write(self) -> None:
        """Write the rows, once the window is through."""
        slots = [slot for _, slot in self._taken]
        assert (self._filled == self._file.shape.num_slots).all()
        for layer_idx, rows in enumerate(self._rows):
            self._file.write(layer_idx, slots, rows)

    def _tokens(self, ffn: FfnPass, count: int) -> list[int]:
        """Indices in the window of a pass's tokens."""
        within = range(count) if ffn.tokens is None else ffn.tokens.tolist()
        return [self._start + idx for idx in within]
