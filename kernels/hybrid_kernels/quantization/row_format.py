"""The one byte layout of a weight row, read by Numba and Triton alike, so that a bundle moves between tiers by a copy.

A row holds `columns` weights. It is the values, then (for the quantised kinds) one float16 scale per group, then zero
bytes up to a multiple of `ROW_ALIGNMENT`, so that every row of a matrix starts on a cache line:

    f32, bf16   the values, little-endian
    q8          int8 values; weight = scale * q
    q4          int32 words of eight nibbles; weight = scale * (nibble - 8). Within one group nibble i of word j holds
                column (group / 8) * i + j, so that one shift of a vector of words gives neighbouring columns

Columns are padded with zero weights to a multiple of the group. Sizes: at 4096 columns a row takes 16384 B (f32),
8192 B (bf16), 4352 B (q8, group 32), 2304 / 2176 / 2112 B (q4, groups 32 / 64 / 128).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

RowKind = Literal["f32", "bf16", "q8", "q4"]
ROW_KINDS: tuple[RowKind, ...] = get_args(RowKind)
GROUP_SIZES = (32, 64, 128)
ROW_ALIGNMENT = 64  # bytes: one cache line, and one AVX-512 load
WORD_BYTES = 4  # that values are read by

_VALUE_BITS: dict[RowKind, int] = {"f32": 32, "bf16": 16, "q8": 8, "q4": 4}
_SCALE_BYTES = 2


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How the weights of one row are written: `kind`, and for q8 and q4 how many columns share a scale (else 0)."""

    kind: RowKind
    group: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError when the pair is not one that every kernel reads."""
        if self.kind not in ROW_KINDS:
            raise ValueError(f"row kind {self.kind!r} is not one of {', '.join(ROW_KINDS)}")
        if type(self.group) is not int:  # 32.0 == 32, but sizes computed from it are no sizes
            raise ValueError(f"group {self.group!r} is not a whole number")
        if self.is_quantized and self.group not in GROUP_SIZES:
            raise ValueError(f"group {self.group} of a {self.kind} row is not one of {GROUP_SIZES}")
        if not self.is_quantized and self.group != 0:
            raise ValueError(f"a {self.kind} row has no groups, found group {self.group}")

    @property
    def is_quantized(self) -> bool:
        """Whether the row carries scales."""
        return self.kind in ("q8", "q4")

    def padded_columns(self, columns: int) -> int:
        """Columns after zero weights fill the last group."""
        return columns if self.group == 0 else -(-columns // self.group) * self.group

    def value_bytes(self, columns: int) -> int:
        """Bytes of the values of one row, without its scales."""
        return self.padded_columns(columns) * _VALUE_BITS[self.kind] // 8

    def scale_bytes(self, columns: int) -> int:
        """Bytes of the scales of one row."""
        return 0 if self.group == 0 else self.padded_columns(columns) // self.group * _SCALE_BYTES

    def row_bytes(self, columns: int) -> int:
        """Bytes from the start of one row to the start of the next."""
        used = self.value_bytes(columns) + self.scale_bytes(columns)
        return -(-used // ROW_ALIGNMENT) * ROW_ALIGNMENT

    def close_row_bytes(self, columns: int) -> int:
        """The same without the padding: of rows that are read one after the other, so that no line is read twice."""
        used = self.value_bytes(columns) + self.scale_bytes(columns)
        return -(-used // WORD_BYTES) * WORD_BYTES

    def __str__(self) -> str:
        return f"{self.kind} group {self.group}" if self.group else self.kind
