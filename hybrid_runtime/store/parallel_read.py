"""Files read into memory by several threads, each taking the next chunk; Python holds no lock while the disk works.

Several threads keep a disk busy and share the work of faulting pages in. Read through the page cache, a large store
would be held twice for as long as the system does not need the room, and arrive at a third of the disk's speed
(benchmarks/load_speed.py), because the cache wants memory too. So it is read past the cache (O_DIRECT on Linux), and
what the cache has of it from before is given back; the next start then costs the disk's time again. Only a store that
any disk reads in a moment goes through the cache and stays there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from hybrid_runtime.errors import StoreError

CHUNK_BYTES = 8 << 20  # a multiple of a huge page, which then belongs to one thread
READ_THREADS = 4
DIRECT_ALIGNMENT = 4096  # bytes: offsets, addresses and lengths of direct reads
LARGEST_CACHED_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Filling:
    """A block of uint8 [n] and the file whose first n bytes it gets. block starts at a page."""

    path: Path
    block: torch.Tensor


def belongs_in_page_cache(num_bytes: int) -> bool:
    """Whether a store of so many bytes may stay in the page cache, beside the copy that is computed with."""
    return num_bytes <= LARGEST_CACHED_BYTES


def fill(fillings: Sequence[Filling], *, past_cache: bool, num_threads: int = READ_THREADS) -> None:
    """Read every file into its block. Raise StoreError, naming the file, for one that is too short or cannot be read.

    Sizes are looked at before anything is read. num_threads: at least 1.
    """
    for filling in fillings:
        _check_size(filling)
    chunks = [
        (filling, start) for filling in fillings for start in range(0, len(filling.block), CHUNK_BYTES)
    ]  # in the order of the disk, as far as the file system kept it
    with ThreadPoolExecutor(min(num_threads, len(chunks)), thread_name_prefix="read") as pool:
        pending = [pool.submit(_read_chunk, filling, start, past_cache=past_cache) for filling, start in chunks]
        try:
            for chunk in pending:
                chunk.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _check_size(filling: Filling) -> None:
    found = filling.path.stat().st_size
    if found < len(filling.block):
        raise _too_short(filling, found)


def _too_short(filling: Filling, found: int) -> StoreError:
    return StoreError(f"{filling.path}: ends at byte {found}, expected {len(filling.block)}; convert the model again")


def _read_chunk(filling: Filling, start: int, *, past_cache: bool) -> None:
    view = filling.block.numpy().data
    stop = min(start + CHUNK_BYTES, len(view))
    try:
        done = _read_directly(filling.path, view, start, stop) if past_cache else start
        with filling.path.open("rb", buffering=0) as file:
            file.seek(done)
            while done < stop:
                count = file.readinto(view[done:stop])
                if not count:
                    raise _too_short(filling, done)
                done += count
            if past_cache and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise StoreError(f"{filling.path}: cannot be read at byte {start}: {error.strerror or error}") from error


def _read_directly(path: Path, view: memoryview, start: int, stop: int) -> int:
    """Read whole aligned blocks without the page cache, where the system and the file system can; how far it came."""
    flag = getattr(os, "O_DIRECT", 0)
    end = stop // DIRECT_ALIGNMENT * DIRECT_ALIGNMENT
    done = start
    if not flag or end <= start:
        return done
    try:
        with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | flag)) as file:
            file.seek(start)
            while done < end and (count := file.readinto(view[done:end])):
                done += count
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system without direct reads, or with larger blocks
            raise
    return done
