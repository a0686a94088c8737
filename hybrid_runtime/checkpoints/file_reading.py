"""Byte ranges of checkpoint files, read with positioned reads and never mapped.

A mapped page counts as resident memory as soon as it is touched, and the converter promises a peak; a mapped file that
shrinks also kills the process with SIGBUS where a read returns a short count. So the readers of this package share one
descriptor wrapper that turns every operating-system failure into a `CheckpointError` naming the file. What the bytes
mean is not known here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hybrid_runtime.errors import CheckpointError

# A positioned read returns at most 2 GiB - 4 KiB on Linux; smaller calls also notice Ctrl-C sooner.
MAX_READ_BYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open regular file and the size that every offset in it is checked against."""

    path: Path
    descriptor: int
    num_bytes: int

    def read(self, offset: int, num_bytes: int) -> bytes:
        """The bytes [offset, offset + num_bytes); the caller has checked the count against `num_bytes` of the file."""
        buffer = bytearray(num_bytes)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills the whole of `buffer` (bytes) with what the file holds from `offset` on."""
        filled = 0
        while filled < len(buffer):
            part = buffer[filled : filled + MAX_READ_BYTES]
            try:
                count = os.preadv(self.descriptor, [part], offset + filled)
            except OSError as error:
                message = f"{self.path}: reading at byte {offset + filled} failed: {error.strerror}; check the disk"
                raise CheckpointError(message) from error
            if count == 0:
                end = offset + len(buffer)
                raise CheckpointError(
                    f"{self.path}: ends at byte {offset + filled}, expected at least {end}; "
                    "it was cut short after its header was read: fetch it again"
                )
            filled += count


@contextmanager
def open_file(path: Path) -> Iterator[OpenFile]:
    """Opens a regular file; anything else (missing, a folder, a pipe that would block) is refused by name."""
    try:
        # O_NONBLOCK: opening a pipe for reading would otherwise wait for a writer; regular files ignore it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}; check the path and its rights") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: is not a regular file; name the checkpoint's file itself")
        yield OpenFile(path, descriptor, status.st_size)
    finally:
        os.close(descriptor)
