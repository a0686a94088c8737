"""Memory of the disk tier: slots of bundles that were read lately, buffers that reads arrive in, what is under way.

The compiled kernels do the work (hybrid_kernels/tiers); this has their words, and what was counted.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hybrid_kernels.native.arguments import Word, words
from hybrid_kernels.team import Team
from hybrid_kernels.tiers import layout
from hybrid_runtime.errors import StoreError
from hybrid_runtime.store.direct_file import page_aligned, pages_around
from hybrid_runtime.store.memory import anonymous_block

NUM_BUFFERS = 128  # reads under way: more are not quicker on the disks seen
MOST_READ_BYTES = 64 << 10  # of bundles that lie side by side, in one read
BLOCK_BYTES, EVENT_BYTES = 64, 32  # Linux's struct iocb and io_event
TIMEOUT_NS = 100_000_000
_IO_SETUP, _IO_DESTROY = 206, 207  # x86-64


@dataclass(frozen=True, slots=True)
class TierCounts:
    """What decoding did since the counters were reset. stall_ticks: of the time counter, all workers together."""

    hot_neurons: int
    cold_neurons: int
    disk_hits: int
    disk_misses: int
    disk_reads: int
    disk_bytes: int
    stall_ticks: int


class DiskCache:
    """num_slots bundles of slot_bytes each. most_misses: bundles that one layer can ask for; there must be more slots.

    slots live in memory that is taken as they are filled. asynchronous: hand reads in and go on, where the system can.
    """

    def __init__(self, num_slots: int, slot_bytes: int, most_misses: int, *, asynchronous: bool = True) -> None:
        if 0 < num_slots <= most_misses:  # no slot would be free for the layer's last bundle
            raise ValueError(f"num_slots is {num_slots}, expected 0 or more than most_misses, {most_misses}")
        self.num_slots = num_slots
        self._team: Team | None = None
        slots = anonymous_block(num_slots * slot_bytes) if num_slots else torch.zeros(0, dtype=torch.uint8)
        counts = [np.zeros(max(1, num_slots), dtype=np.int64) for _ in range(3)]
        num_buffers = NUM_BUFFERS if num_slots else 1
        buffer_bytes = pages_around(max(slot_bytes, MOST_READ_BYTES if num_slots else 1))
        free = np.arange(num_buffers, dtype=np.int64)
        self._context = _setup(num_buffers) if num_slots and asynchronous else 0
        values: dict[int, Word] = {
            layout.SLOTS: slots if num_slots else None,
            layout.SLOT_BYTES: slot_bytes,
            layout.NUM_SLOTS: num_slots,
            layout.OWNERS: counts[0],
            layout.ASKED: counts[1],
            layout.LAST_USED: counts[2],
            layout.CONTEXT: self._context,
            layout.BUFFERS: (buffers := page_aligned(num_buffers * buffer_bytes)),
            layout.BUFFER_BYTES: buffer_bytes,
            layout.NUM_BUFFERS: num_buffers,
            layout.FREE: free,
            layout.NUM_FREE: num_buffers,
            layout.BLOCKS: (blocks := np.zeros(num_buffers * BLOCK_BYTES, dtype=np.uint8)),
            layout.POINTERS: (pointers := np.zeros(num_buffers, dtype=np.int64)),
            layout.EVENTS: (events := np.zeros(num_buffers * EVENT_BYTES, dtype=np.uint8)),
            layout.TIMEOUT: (timeout := np.array([0, TIMEOUT_NS], dtype=np.int64)),
            layout.MISSES: (misses := np.zeros((most_misses, 2), dtype=np.int64)),
            layout.READS: (reads := np.zeros((most_misses, layout.READ_WORDS), dtype=np.int64)),
        }
        self.words = words(layout.DISK_WORDS, values)
        self._kept = (slots, counts, free, buffers, blocks, pointers, events, timeout, misses, reads)
        # the memory must outlive reads that are under way, which io_destroy waits for
        self._finalizer = weakref.finalize(self, _destroy, self._context, (self.words, self._kept))

    @property
    def is_asynchronous(self) -> bool:
        """Whether reads go on while bundles are computed."""
        return self._context != 0

    def serve(self, team: Team) -> None:
        """From now on its workers wait here."""
        self.words[layout.TEAM] = team.state_address
        self._team = team

    def counts(self) -> TierCounts:
        """Since the last reset."""
        names = (
            layout.HOT_NEURONS,
            layout.COLD_NEURONS,
            layout.HITS,
            layout.TOTAL_MISSES,
            layout.TOTAL_READS,
            layout.TOTAL_BYTES,
            layout.STALL_TICKS,
        )
        return TierCounts(*(int(self.words[name]) for name in names))

    def reset_counts(self) -> None:
        """Begin at zero. What the cache holds stays."""
        for name in range(layout.HITS, layout.COLD_NEURONS + 1):
            self.words[name] = 0

    def check(self) -> None:
        """Raise StoreError where a read has failed: what was computed since then is not to be used."""
        failed = int(self.words[layout.FAILED])
        if failed:
            why = os.strerror(-failed) if failed < 0 else "the file ends too early"
            file = _name(int(self.words[layout.FAILED_FILE]))
            raise StoreError(f"{file}: neurons could not be read: {why}; load the model again")


def _name(descriptor: int) -> str:
    """Of an open file, where the system tells."""
    try:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink()) if descriptor else "the store"
    except OSError:
        return "the store"


def _setup(num_reads: int) -> int:
    """Linux's context for asynchronous reads; 0 where there is none."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return 0
    context = ctypes.c_ulong(0)
    result = ctypes.CDLL(None, use_errno=True).syscall(_IO_SETUP, num_reads, ctypes.byref(context))
    return int(context.value) if result == 0 else 0


def _destroy(context: int, kept: object) -> None:
    del kept
    if context:
        ctypes.CDLL(None).syscall(_IO_DESTROY, ctypes.c_ulong(context))
