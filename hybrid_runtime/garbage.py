"""Leaving Python's garbage collector alone for a while."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collections(*, freezes: bool = False) -> Iterator[None]:
    """Nothing is collected meanwhile. freezes: nor looked at later, of what there is at the end."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if freezes:
                gc.freeze()
            gc.enable()
