"""Packed rows times many vectors, compiled: products of bytes, in panels that a whole batch shares.

Bound by arithmetic. Workers draw eight rows at a time (or 128 columns of a down projection), unpack them into a panel
that the first- or second-level cache holds, and run every vector over it. Each output is one worker's, summed in a
fixed order: results do not depend on how many workers there are.
"""

from __future__ import annotations

from hybrid_kernels.linear.batch_layout import (
    BLOCK,
    CODE,
    COUNT,
    GROUPS,
    NUM_ROWS,
    OUTPUT,
    PANEL_ROWS,
    Q_CODE,
    Q_COLUMNS,
    Q_COUNT,
    Q_GROUPS,
    Q_LEVELS,
    Q_SCALES,
    Q_SCRATCH,
    Q_SCRATCH_STRIDE,
    Q_SHORTS,
    Q_STARTS,
    Q_STRIDE,
    Q_VECTOR_COLUMNS,
    Q_X,
    SCRATCH,
    SCRATCH_STRIDE,
    UNPACK_CODE,
    UNPACK_COUNT,
    UNPACK_GROUPS,
    UNPACK_OUTPUT,
    UNPACK_OUTPUT_STRIDE,
    UNPACK_ROWS,
    UNPACK_STRIDE,
    UNPACK_VALUE_BYTES,
    VALUE_BYTES,
    VECTOR_COLUMNS,
)
from hybrid_kernels.linear.cpu_tile import multiply_tile, row_address
from hybrid_kernels.native.memory_access import (
    atomic_add,
    get_i8,
    get_i64,
    put_i32,
    put_i64,
)
from hybrid_kernels.row_codes import FIRST_Q4
from hybrid_kernels.simd.float_rows import row_unpack
from hybrid_kernels.simd.int8_rows import quantize_vector
from hybrid_kernels.simd.panels import TILE, build_panel
from hybrid_kernels.simd.vectors import copy_values, fill_zeros

UNPACK_ROWS_PER_TASK = 16


def quantize_batch(arguments: int, worker: int, counter: int) -> None:
    """Every vector as int8, with scales and starts."""
    width, groups = get_i64(arguments, Q_VECTOR_COLUMNS), get_i64(arguments, Q_GROUPS)
    columns, blocks = get_i64(arguments, Q_COLUMNS), width // BLOCK
    vector = get_i64(arguments, Q_SCRATCH) + worker * get_i64(arguments, Q_SCRATCH_STRIDE)
    while True:
        idx = atomic_add(counter, 1)
        if idx >= get_i64(arguments, Q_COUNT):
            return
        copy_values(get_i64(arguments, Q_X) + idx * get_i64(arguments, Q_STRIDE), vector, columns)
        fill_zeros(vector, columns, width)
        levels = get_i64(arguments, Q_LEVELS) + idx * width
        scales = get_i64(arguments, Q_SCALES) + idx * groups * 4
        quantize_vector(get_i64(arguments, Q_CODE), vector, levels, scales, vector + 4 * width, groups)
        starts = get_i64(arguments, Q_STARTS) + idx * blocks * 4
        for block in range(blocks):
            level_sum = 0
            for place in range(BLOCK):
                level_sum += get_i8(levels + block * BLOCK, place)
            if get_i64(arguments, Q_SHORTS) != 0:
                put_i32(starts, block, ((-4 * level_sum) & 0xFFFF) * 0x10001)
            else:
                put_i32(starts, block, -8 * level_sum)


def multiply_batch(arguments: int, worker: int, counter: int) -> None:
    """Output [vectors, rows] = every vector times every row, of q4 or q8."""
    num_rows, width, groups = (
        get_i64(arguments, NUM_ROWS),
        get_i64(arguments, VECTOR_COLUMNS),
        get_i64(arguments, GROUPS),
    )
    panel = get_i64(arguments, SCRATCH) + worker * get_i64(arguments, SCRATCH_STRIDE)
    panel_scales = panel + PANEL_ROWS * width
    tables = panel_scales + PANEL_ROWS * 4 * groups
    is_nibbles = get_i64(arguments, CODE) >= FIRST_Q4
    while True:
        first = atomic_add(counter, 1) * PANEL_ROWS
        if first >= num_rows:
            return
        for lane in range(PANEL_ROWS):
            put_i64(tables, lane, row_address(arguments, min(first + lane, num_rows - 1)))
        build_panel(get_i64(arguments, CODE), tables, panel, panel_scales, get_i64(arguments, VALUE_BYTES), groups)
        for token in range(0, get_i64(arguments, COUNT), TILE):
            output = get_i64(arguments, OUTPUT) + 4 * first
            multiply_tile(
                arguments, tables, panel, panel_scales, token, 0, groups, is_nibbles, output, num_rows - first, False
            )


def unpack_matrix(arguments: int, worker: int, counter: int) -> None:
    """Rows of any format as float32."""
    count = get_i64(arguments, UNPACK_COUNT)
    while True:
        first = atomic_add(counter, 1) * UNPACK_ROWS_PER_TASK
        if first >= count:
            return
        for idx in range(first, min(first + UNPACK_ROWS_PER_TASK, count)):
            row = get_i64(arguments, UNPACK_ROWS) + idx * get_i64(arguments, UNPACK_STRIDE)
            output = get_i64(arguments, UNPACK_OUTPUT) + idx * get_i64(arguments, UNPACK_OUTPUT_STRIDE)
            scales = row + get_i64(arguments, UNPACK_VALUE_BYTES)
            row_unpack(get_i64(arguments, UNPACK_CODE), row, scales, output, get_i64(arguments, UNPACK_GROUPS))
