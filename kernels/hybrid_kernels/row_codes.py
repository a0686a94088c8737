"""Numbers by which compiled code knows the row formats, and how long its loops over a row are."""

from __future__ import annotations

from hybrid_kernels.quantization.row_format import RowFormat

LANES = 8  # columns that a loop over float rows takes at once

FORMATS: tuple[RowFormat, ...] = (
    RowFormat("f32"),
    RowFormat("bf16"),
    *(RowFormat("q8", group) for group in (32, 64, 128)),
    *(RowFormat("q4", group) for group in (32, 64, 128)),
)
FIRST_QUANTIZED = 2  # codes from here on have scales, and meet int8 vectors
FIRST_Q4 = 5  # codes from here on are q4


def format_code(row_format: RowFormat) -> int:
    """The number by which compiled code knows a format."""
    return FORMATS.index(row_format)


def vector_columns(row_format: RowFormat, columns: int) -> int:
    """Length of the vector that kernels read or write beside a row of that many columns."""
    step = row_format.group or LANES
    return -(-columns // step) * step


def num_groups(row_format: RowFormat, columns: int) -> int:
    """Turns of the loop over a row of that many columns."""
    return vector_columns(row_format, columns) // (row_format.group or LANES)
