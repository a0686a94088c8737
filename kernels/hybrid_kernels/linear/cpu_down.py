"""A down projection of many vectors, compiled: rows are neurons, and the sum runs over them."""

from __future__ import annotations

import numba

from hybrid_kernels.linear.batch_layout import (
    BLOCK,
    CODE,
    COLUMNS,
    COUNT,
    DOWN_COLUMNS,
    DOWN_ROWS,
    NUM_ROWS,
    OUTPUT,
    PANEL_ROWS,
    SCRATCH,
    SCRATCH_STRIDE,
    VALUE_BYTES,
)
from hybrid_kernels.linear.cpu_tile import multiply_tile, row_address
from hybrid_kernels.native.memory_access import (
    atomic_add,
    get_i64,
)
from hybrid_kernels.row_codes import FIRST_Q4
from hybrid_kernels.simd.float_rows import row_unpack
from hybrid_kernels.simd.panels import TILE, requantize
from hybrid_kernels.simd.vectors import fill_zeros


def multiply_down(arguments: int, worker: int, counter: int) -> None:
    """Output [vectors, columns] = sum over rows of the vector's value times the row, rows of any format.

    The vectors are q8's, group 32, over rows. Rows are made bytes again with one scale for 32 of a column: their scales
    run along the wrong way for sums in integers. An output's tile is added to, 512 rows at a time.
    """
    columns, num_rows = get_i64(arguments, COLUMNS), get_i64(arguments, NUM_ROWS)
    panel = get_i64(arguments, SCRATCH) + worker * get_i64(arguments, SCRATCH_STRIDE)
    panel_scales = panel + DOWN_ROWS * DOWN_COLUMNS
    unpacked = panel_scales + DOWN_ROWS * DOWN_COLUMNS // BLOCK * 4
    tables = unpacked + BLOCK * DOWN_COLUMNS * 4
    while True:
        first_column = atomic_add(counter, 1) * DOWN_COLUMNS
        if first_column >= columns:
            return
        num_columns = min(DOWN_COLUMNS, columns - first_column)
        num_panels = (num_columns + PANEL_ROWS - 1) // PANEL_ROWS
        for first_row in range(0, num_rows, DOWN_ROWS):
            num_blocks = (min(DOWN_ROWS, num_rows - first_row) + BLOCK - 1) // BLOCK
            for block in range(num_blocks):
                _unpack_block(arguments, unpacked, first_row + block * BLOCK, first_column, num_columns)
                for idx in range(num_panels):
                    place = idx * (DOWN_ROWS // BLOCK) + block
                    requantize(
                        unpacked + idx * 32,
                        4 * DOWN_COLUMNS,
                        panel + place * PANEL_ROWS * BLOCK,
                        panel_scales + place * 32,
                    )
            for token in range(0, get_i64(arguments, COUNT), TILE):
                for idx in range(num_panels):
                    place = idx * (DOWN_ROWS // BLOCK)
                    column = idx * PANEL_ROWS
                    multiply_tile(
                        arguments,
                        tables,
                        panel + place * PANEL_ROWS * BLOCK,
                        panel_scales + place * 32,
                        token,
                        first_row // BLOCK,
                        num_blocks,
                        False,
                        get_i64(arguments, OUTPUT) + 4 * (first_column + column),
                        num_columns - column,
                        first_row > 0,
                    )


@numba.njit(error_model="numpy")
def _unpack_block(arguments: int, output: int, first_row: int, first_column: int, num_columns: int) -> None:
    """BLOCK rows' columns first_column ... as float32 [BLOCK, DOWN_COLUMNS]; zeros beyond the last row."""
    code, num_rows = get_i64(arguments, CODE), get_i64(arguments, NUM_ROWS)
    step = _group_of(code)
    groups = (num_columns + step - 1) // step
    for idx in range(BLOCK):
        target = output + idx * DOWN_COLUMNS * 4
        if first_row + idx >= num_rows:
            fill_zeros(target, 0, DOWN_COLUMNS)
            continue
        row = row_address(arguments, first_row + idx)
        values = row + _value_offset(code, first_column)
        scales = row + get_i64(arguments, VALUE_BYTES) + first_column // step * 2
        row_unpack(code, values, scales, target, groups)


@numba.njit(error_model="numpy")
def _group_of(code: int) -> int:
    """Columns that row_unpack handles at a time."""
    if code < 2:
        return 8
    return 32 << ((code - 2) % 3)


@numba.njit(error_model="numpy")
def _value_offset(code: int, column: int) -> int:
    if code == 0:
        return 4 * column
    if code == 1:
        return 2 * column
    return column if code < FIRST_Q4 else column // 2
