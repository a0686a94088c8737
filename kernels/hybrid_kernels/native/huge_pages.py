"""Anonymous memory in huge pages where the system has them, through which weights are read faster."""

from __future__ import annotations

import math
import mmap

import numpy as np
from numpy.typing import DTypeLike

HUGE_PAGE = 2 << 20


def huge_empty(num_bytes: int) -> np.ndarray:
    """uint8 [num_bytes], zero, of private anonymous memory; large ones start at a huge page. Lives with the array."""
    private = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
    spare = HUGE_PAGE if num_bytes >= HUGE_PAGE else 0
    memory = mmap.mmap(-1, max(num_bytes + spare, 1), flags=private)
    if spare and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel built without: ordinary pages do
            spare = HUGE_PAGE
    whole = np.frombuffer(memory, dtype=np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE if spare else 0
    return whole[start : start + num_bytes]


def aligned_zeros(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Zeros that start at a page: vectors loaded from them cross no cache line, as NumPy's own 16 bytes let them."""
    kind = np.dtype(dtype)
    return huge_empty(math.prod(shape) * kind.itemsize).view(kind).reshape(shape)
