"""The order in which int8 kernels hold a group's columns: the one in which nibbles come out of a q4 row's bytes."""

from __future__ import annotations

from hybrid_kernels.quantization.row_format import RowFormat

# Rows added at once: more would spread reading the sum over more of them, but each lies in a page of its own, of which
# a core keeps few at hand.
MOST_ROWS = 16
assert MOST_ROWS * 8 * 127 < 1 << 15  # sums of nibbles times factors are int16


def chunk_bytes(row_format: RowFormat) -> int:
    """Bytes of a q4 group whose low nibbles are taken together, and then their high ones."""
    return min(32, row_format.group // 2)


def packed_columns(row_format: RowFormat) -> list[int]:
    """Column of each place of a group: for q8 the same; for q4 see row_format for where a column's nibble lies."""
    group = row_format.group
    if row_format.kind != "q4":
        return list(range(group))
    words, chunk = group // 8, chunk_bytes(row_format)
    columns = []
    for first in range(0, group // 2, chunk):
        for high in range(2):
            for byte in range(first, first + chunk):
                word, byte_of_word = divmod(byte, 4)
                columns.append((2 * byte_of_word + high) * words + word)
    return columns
