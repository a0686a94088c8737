"""Rows of random weights, drawn in the packed layout itself: fitting q4 to random floats would take a hundred times
as long and give levels as random.

Quantised levels are uniform over the kind's range; each group's scale has a random sign, because the range of q4 is not
symmetric and products would otherwise not sum to zero on average. A *planted* value lies in a row's first column: the
rest of its group is zero then, so that the scale is the value's alone and float16 is its whole error.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch

from hybrid_kernels.quantization.op import quantize_rows
from hybrid_kernels.quantization.row_format import RowFormat

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]

_LEVELS = {
    "q4": np.arange(-8, 8, dtype=np.float64),
    "q8": np.concatenate(([-127.0], np.arange(-127, 128, dtype=np.float64))),  # -128 is drawn, and made -127
}
_NO_NIBBLES = 0x88  # two q4 levels of zero
_HIGHEST_LEVEL = {"q4": 7, "q8": 127}
_SIGN = np.uint16(0x8000)


def generator_of(seed: int, name: str) -> np.random.Generator:
    """A stream of its own for each name, so that a part can be drawn again without those before it."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.Generator(np.random.SFC64([seed, *digest[:16]]))


def random_rows(
    generator: np.random.Generator, num_rows: int, columns: int, row_format: RowFormat, std: float
) -> Bytes:
    """Uint8 [num_rows, row_bytes] standing for weights of mean 0 and the given standard deviation."""
    if not row_format.is_quantized:
        weights = generator.standard_normal((num_rows, columns), dtype=np.float32)
        weights *= np.float32(std)
        return quantize_rows(torch.from_numpy(weights), row_format).numpy()
    row_bytes = row_format.row_bytes(columns)
    rows = generator.integers(0, 1 << 64, (num_rows, row_bytes // 8), dtype=np.uint64).view(np.uint8)
    if row_format.kind == "q8":
        levels = rows[:, : row_format.value_bytes(columns)].view(np.int8)
        np.maximum(levels, -127, out=levels)
    scales = _scales(rows, columns, row_format)
    scales &= _SIGN
    scales |= np.float16(std / level_rms(row_format)).view(np.uint16)
    rows[:, row_format.value_bytes(columns) + row_format.scale_bytes(columns) :] = 0
    for column in range(columns, row_format.padded_columns(columns)):
        _clear_level(rows, column, row_format)
    return rows


def level_rms(row_format: RowFormat) -> float:
    """Root mean square of the levels that random_rows draws."""
    return float(np.sqrt(np.mean(np.square(_LEVELS[row_format.kind]))))


def plant_first(rows: Bytes, columns: int, row_format: RowFormat, values: Floats | float) -> None:
    """Set the first weight of every row to values ([N], or one for all), in place."""
    if row_format.is_quantized:
        rows[:, : row_format.value_bytes(row_format.group)] = _NO_NIBBLES if row_format.kind == "q4" else 0
        highest = _HIGHEST_LEVEL[row_format.kind]
        rows[:, 0] = (_NO_NIBBLES & 0xF0) | (highest + 8) if row_format.kind == "q4" else highest
        _scales(rows, columns, row_format)[:, 0] = np.float16(np.asarray(values) / highest).view(np.uint16)
        return
    first = np.broadcast_to(np.asarray(values, dtype=np.float32), len(rows)).reshape(-1, 1)
    planted = quantize_rows(torch.from_numpy(first.copy()), row_format).numpy()
    size = row_format.value_bytes(1)
    rows[:, :size] = planted[:, :size]


def clear_first(rows: Bytes, row_format: RowFormat) -> None:
    """Make the first weight of every row zero, in place."""
    if row_format.is_quantized:
        _clear_level(rows, 0, row_format)
    else:
        rows[:, : row_format.value_bytes(1)] = 0


def _scales(rows: Bytes, columns: int, row_format: RowFormat) -> npt.NDArray[np.uint16]:
    """The bits of the float16 scales, [N, groups], a view."""
    start = row_format.value_bytes(columns)
    return rows[:, start : start + row_format.scale_bytes(columns)].view(np.uint16)


def _clear_level(rows: Bytes, column: int, row_format: RowFormat) -> None:
    if row_format.kind == "q8":
        rows[:, column] = 0
        return
    group_idx, place = divmod(column, row_format.group)
    nibble, word = divmod(place, row_format.group // 8)
    byte = rows[:, group_idx * row_format.group // 2 + word * 4 + nibble // 2]
    kept, zero = (0x0F, 0x80) if nibble % 2 else (0xF0, 0x08)
    byte &= kept
    byte |= zero
