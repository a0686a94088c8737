"""Which row formats the code that is being generated can meet: one, in a process that compiles a kernel for it."""

from __future__ import annotations

import os

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.row_codes import FORMATS

FORMAT_VARIABLE = "HYBRID_KERNEL_FORMAT"  # a format's number, set by build.py in its own process


def emitted_formats() -> tuple[tuple[int, RowFormat], ...]:
    """Numbers and formats to generate code for; all of them where no one is named."""
    chosen = int(os.environ.get(FORMAT_VARIABLE, "-1"))
    return tuple((idx, row_format) for idx, row_format in enumerate(FORMATS) if chosen in (-1, idx))
