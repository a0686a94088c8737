"""Files that are there whole or not at all, also after a kill or a power cut."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

TEMPORARY = ".tmp"  # ends every name that a kill may leave behind; who owns the folder removes it or writes over it


def write_whole(path: Path, data: bytes) -> None:
    """Replace path by data in one step, once the disk has all of it. One writer at a time: the owner holds a lock.

    Raises OSError, which names path, and leaves what was there before.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if error.filename is None:  # writing knows no names, and whoever reads the error wants one
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can (Windows cannot open a folder)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
