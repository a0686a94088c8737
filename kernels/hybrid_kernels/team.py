"""Worker threads that live as long as the model and sleep between tokens, and the programs they run together.

A program is a list of kernels with their arguments, prepared once and run many times: a whole token is one call from
Python, which lets go of the GIL. Workers draw shares of each operation's work from a counter, so that one which another
process has pushed aside holds up the others by two shares at most.
"""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hybrid_kernels.native import state_layout as words
from hybrid_kernels.native.kernel_names import Kernel, kernel
from hybrid_kernels.native.load import KernelLibrary

MOST_THREADS = 256
_KERNEL = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3)


class WorkerGoneError(RuntimeError):
    """A worker's thread has ended in the middle of a program: what it would have computed is missing."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One kernel of a program. arguments: int64 words whose meaning the kernel's file defines.

    label: what profiles call it. barrier: whether the next operation reads what other workers write in this one.
    beginning: what each worker reads first, which is known long before, so that it is prefetched ahead of the barrier.
    """

    kernel: Kernel
    label: str
    arguments: np.ndarray
    barrier: bool = True
    beginning: Beginning | None = None


@dataclass(frozen=True, slots=True)
class Beginning:
    """num_bytes at address + worker * stride."""

    address: int
    stride: int
    num_bytes: int


class Program:
    """Operations in the form that compiled code runs. Keeps their arguments alive."""

    def __init__(self, operations: Sequence[Operation], library: KernelLibrary) -> None:
        self.operations = tuple(operations)
        self.words = np.zeros((len(operations), words.OPERATION_WORDS), dtype=np.int64)
        self.counters = np.zeros((len(operations), words.LINE), dtype=np.int64)
        library.prepare({operation.kernel for operation in operations})
        for row, operation in zip(self.words, operations, strict=True):
            assert operation.arguments.dtype == np.int64
            row[words.FUNCTION] = library.address(operation.kernel)
            row[words.ARGUMENTS] = operation.arguments.ctypes.data
            row[words.BARRIER] = int(operation.barrier)
        for before, operation in zip(self.words, operations[1:], strict=False):
            if operation.beginning is not None:
                before[words.AHEAD] = operation.beginning.address
                before[words.AHEAD_STRIDE] = operation.beginning.stride
                before[words.AHEAD_BYTES] = operation.beginning.num_bytes

    def labels(self) -> list[str]:
        """Of the operations, in order."""
        return [operation.label for operation in self.operations]

    def ticks_by_label(self) -> dict[str, int]:
        """Ticks of the time counter since the last reset, by label."""
        totals: dict[str, int] = {}
        for operation, row in zip(self.operations, self.words, strict=True):
            totals[operation.label] = totals.get(operation.label, 0) + int(row[words.TICKS])
        return totals

    def timeline(self) -> list[tuple[str, int, int]]:
        """Of the last run: each operation's label, when it began, and how long it took but for the last, in ticks."""
        starts = [int(row[words.STARTED]) for row in self.words]
        ends = [*starts[1:], starts[-1]]
        return [(label, start, end - start) for label, start, end in zip(self.labels(), starts, ends, strict=True)]

    def reset_ticks(self) -> None:
        """Start a new profile."""
        self.words[:, words.TICKS] = 0


class Team:
    """num_threads workers, of which the caller's thread is one. One program at a time.

    kernel_s adds up the seconds spent in compiled code. Raises ValueError for a number of threads below 1 or above 256.
    """

    def __init__(self, num_threads: int, library: KernelLibrary | None = None) -> None:
        if not 1 <= num_threads <= MOST_THREADS:
            raise ValueError(f"{num_threads} threads: expected 1 to {MOST_THREADS}")
        self.num_threads = num_threads
        self.library = library or KernelLibrary()
        self.library.prepare([kernel("run_program"), kernel("work_until_closed")])
        self.kernel_s = 0.0
        self._state = np.zeros(words.STATE_WORDS, dtype=np.int64)
        self._state[words.NUM_WORKERS] = num_threads
        self._threads = np.zeros(num_threads, dtype=np.int64)
        self._state[words.THREADS] = self._threads.ctypes.data
        self._returned = np.zeros(2, dtype=np.int64)  # what a Numba function writes its result's and error's pointer to
        self._run = _KERNEL(self.library.address(kernel("run_program")))
        self._lock = threading.Lock()
        self._current: Program | None = None
        own = [np.zeros(2 * words.LINE, dtype=np.int64) for _ in range(num_threads - 1)]
        work = _KERNEL(self.library.address(kernel("work_until_closed")))
        threads = [
            threading.Thread(
                target=_work, args=(work, self._state, idx + 1, mine), name=f"hybrid-worker-{idx + 1}", daemon=True
            )
            for idx, mine in enumerate(own)
        ]
        for thread in threads:
            thread.start()
        self._finalizer = weakref.finalize(self, _close, self._run, (self._state, self._threads), threads)

    def program(self, operations: Sequence[Operation]) -> Program:
        """Prepare operations to be run by this team."""
        return Program(operations, self.library)

    def run(self, program: Program) -> None:
        """Run every operation of the program once, on all workers.

        Raises WorkerGoneError, within a second, where a worker's thread has ended; the team can run nothing any more.
        """
        with self._lock:
            self._check()
            if program is not self._current:
                self._state[words.PROGRAM] = program.words.ctypes.data
                self._state[words.LENGTH] = len(program.operations)
                self._state[words.COUNTERS] = program.counters.ctypes.data
                self._current = program
            started_s = time.perf_counter()
            self._run(self._returned.ctypes.data, self._returned.ctypes.data + 8, self._state.ctypes.data, 0, 0)
            self.kernel_s += time.perf_counter() - started_s
            self._check()

    @property
    def state_address(self) -> int:
        """Of the words that its workers share (native/state_layout.py)."""
        return int(self._state.ctypes.data)

    def _check(self) -> None:
        if self._state[words.CALLED_OFF]:
            raise WorkerGoneError("a worker thread of this process has ended while it computed; load the model again")

    def close(self) -> None:
        """End the workers. Happens by itself when the team is collected."""
        self._finalizer()


def _work(function: object, state: np.ndarray, worker: int, own: np.ndarray) -> None:
    returned = np.zeros(2, dtype=np.int64)
    function(returned.ctypes.data, returned.ctypes.data + 8, state.ctypes.data, worker, own.ctypes.data)  # type: ignore[operator]


def _close(run: object, memory: tuple[np.ndarray, np.ndarray], threads: list[threading.Thread]) -> None:
    """Run a program of nothing, after which workers look whether the team is closed."""
    state, _ = memory
    if state[words.CALLED_OFF]:
        return  # the others have left, or will: one of them is gone and cannot be waited for
    state[words.CLOSED], state[words.LENGTH] = 1, 0
    returned = np.zeros(2, dtype=np.int64)
    run(returned.ctypes.data, returned.ctypes.data + 8, state.ctypes.data, 0, 0)  # type: ignore[operator]
    for thread in threads:
        thread.join()
