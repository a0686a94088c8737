"""How fast single neurons can be fetched from a disk: random reads past the page cache, several at once."""

from __future__ import annotations

import mmap
import os
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FILE_BYTES = 256 << 20
BLOCK_BYTES = (4 << 10, 64 << 10)
NUM_THREADS = 8
MEASURED_S = 0.5
WRITE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class DiskSpeeds:
    """small_reads_per_s: reads of 4 KiB a second; bytes_per_s: of reads of 64 KiB. Both NUM_THREADS at a time.

    past_cache: whether the page cache was left out; where it could not be, the speeds are those of memory at worst.
    """

    small_reads_per_s: float
    bytes_per_s: float
    past_cache: bool


def measure_disk(folder: Path) -> DiskSpeeds:
    """Of the disk that holds the folder, which gets a file of FILE_BYTES for a second. May raise OSError."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="hybrid-disk-", suffix=".tmp") as file:
        block = os.urandom(WRITE_BYTES)
        for _ in range(FILE_BYTES // WRITE_BYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        descriptor, past_cache = _open_past_cache(Path(file.name))
        try:
            small, large = (_reads_per_s(descriptor, size) for size in BLOCK_BYTES)
        finally:
            os.close(descriptor)
    return DiskSpeeds(small, large * BLOCK_BYTES[1], past_cache)


def _open_past_cache(path: Path) -> tuple[int, bool]:
    """A descriptor whose reads reach the disk, where the system and the file system have such; tmpfs has none."""
    if hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECT), True
        except OSError:
            pass
    descriptor = os.open(path, os.O_RDONLY)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return descriptor, False


def _reads_per_s(descriptor: int, size: int) -> float:
    """Reads a second of NUM_THREADS threads together, each waiting for one read at a time."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        counts = list(pool.map(lambda seed: _read_for_a_while(descriptor, size, seed), range(NUM_THREADS)))
    return sum(counts) / MEASURED_S


def _read_for_a_while(descriptor: int, size: int, seed: int) -> int:
    count, end_s = 0, time.perf_counter() + MEASURED_S
    with mmap.mmap(-1, size) as buffer:  # starts at a page, as reads past the cache need
        for offset in _offsets(size, seed):
            if time.perf_counter() >= end_s:
                return count
            os.preadv(descriptor, [buffer], offset)
            count += 1
    return count


def _offsets(size: int, seed: int) -> Iterator[int]:
    generator = random.Random(seed)  # noqa: S311  # where to read, nothing secret
    while True:
        yield generator.randrange(FILE_BYTES // size) * size
