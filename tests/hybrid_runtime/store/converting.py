"""What the tests of conversion share: the call, what it left on the disk, and ways to cut it short."""

from __future__ import annotations

import hashlib

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.progress import NoProgress
from hybrid_runtime.stores import ModelRequest, convert_model

FORMATS = [RowFormat("f32"), RowFormat("bf16"), *(RowFormat(kind, g) for kind in ("q8", "q4") for g in (32, 64, 128))]


def converted(model, folder, row_format=FORMATS[0], progress=None):
    request = ModelRequest(str(model), row_format.kind, row_format.group or None)
    return convert_model(request, folder, folder.parent / "cache", progress or NoProgress())


def contents(folder):
    """Every file below folder with its sha256."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


class StopAfter:
    """A progress that raises once so many bytes are done."""

    def __init__(self, num_bytes, act):
        self.left, self.act = num_bytes, act

    def start(self, label, total_bytes):
        pass

    def advance(self, n):
        self.left -= n
        if self.left <= 0:
            self.act()

    def done(self):
        pass


def interrupt():
    raise KeyboardInterrupt
