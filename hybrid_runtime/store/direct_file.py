"""Ranges of a file read past the page cache: what the disk tier and the loading of some neurons need.

Direct reads begin and end at pages, so a range comes with what lies around it on its pages.
"""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from hybrid_runtime.errors import StoreError

PAGE = 4096  # bytes


def page_aligned(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes] of zeros from a page's start."""
    return torch.frombuffer(mmap.mmap(-1, max(num_bytes, 1)), dtype=torch.uint8, count=num_bytes)


def pages_around(num_bytes: int) -> int:
    """Bytes of the pages that a range of that many bytes lies on at most."""
    return (-(-(num_bytes - 1) // PAGE) + 1) * PAGE


class DirectFile:
    """A file opened for reads past the page cache, where the system and the file system have them."""

    def __init__(self, path: Path) -> None:
        """Raise StoreError for a file that cannot be opened."""
        self.path = path
        try:
            self.descriptor = _open(path)
        except OSError as error:
            raise StoreError(f"{path}: cannot be opened: {error.strerror or error}") from error
        self._finalizer = weakref.finalize(self, os.close, self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Happens by itself when nobody holds it any more. Twice does no harm."""
        self._finalizer()

    def read(self, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """Bytes [start, stop) as a part of buffer: uint8, page_aligned, of pages_around(stop - start) bytes at least.

        Raises StoreError for a file that ends before, and for what the disk refuses.
        """
        first = start // PAGE * PAGE
        wanted = min(-(-stop // PAGE) * PAGE - first, len(buffer))
        view, done = buffer.numpy().data, 0
        try:
            while first + done < stop:
                count = os.preadv(self.descriptor, [view[done:wanted]], first + done)
                if count <= 0:
                    raise StoreError(f"{self.path}: ends at byte {first + done}, expected {stop}; convert it again")
                done += count
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be read at byte {start}: {error.strerror or error}") from error
        return buffer[start - first : stop - first]


def _open(path: Path) -> int:
    if hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            pass  # a file system without direct reads
    return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
