"""Blocks of memory that hold a part of a store: anonymous huge pages to be filled, or the part's file itself, mapped.

Anonymous memory is what the kernels want: weights in the page cache lie in pages of 4 KiB and were measured several
times slower. Huge pages are asked for where the platform has them (Linux) and only where a whole one fits, so that a
part of n bytes takes n bytes. A mapped part costs no memory of its own and no time to load; the operating system
reads its pages when they are first needed and may drop them again. What lies in a block is not known here.
"""

from __future__ import annotations

import errno
import mmap
import sys
from pathlib import Path
from typing import Literal, get_args

import torch

from hybrid_runtime.errors import StoreError

LoadMode = Literal["anonymous", "mmap"]
"""anonymous: read into memory of this process. mmap: left in the file, read by the system when it is needed."""
LOAD_MODES: tuple[LoadMode, ...] = get_args(LoadMode)
HUGE_PAGE = 2 << 20  # bytes: x86, and ARM with base pages of 4 KiB


def anonymous_block(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes] of zeros, from an address that HUGE_PAGE divides. Takes no memory before it is written.

    Raises MemoryError where the system will not promise so much.
    """
    memory = _anonymous(num_bytes + HUGE_PAGE)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    whole = num_bytes // HUGE_PAGE * HUGE_PAGE
    _advise(memory, "MADV_HUGEPAGE", start, whole)
    _advise(memory, "MADV_NOHUGEPAGE", start + whole, len(memory) - start - whole)
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=start)  # keeps the mapping alive


def mapped_block(path: Path, num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes]: the file's own pages, shared with every process that maps it.

    The mapping is private, so a tensor may be made of it without a warning and nothing can reach the file; nobody
    writes to weights, so nothing is copied either. Raises StoreError for a file that is too short.
    """
    with path.open("rb") as file:
        found = file.seek(0, 2)
        if found < num_bytes:
            raise StoreError(f"{path}: ends at byte {found}, expected {num_bytes}; convert the model again")
        memory = mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_COPY)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _anonymous(num_bytes: int) -> mmap.mmap:
    try:
        if sys.platform == "win32":
            return mmap.mmap(-1, num_bytes)
        # private: Python's default is shared memory, which gets huge pages only where the administrator says so
        return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError(f"{num_bytes} bytes of memory") from error
        raise


def _advise(memory: mmap.mmap, advice: str, start: int, num_bytes: int) -> None:
    """Give the advice where the platform knows it; a kernel built without huge pages refuses it, which does no harm."""
    option = getattr(mmap, advice, None)
    if option is None or num_bytes <= 0:
        return
    try:
        memory.madvise(option, start, num_bytes)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
