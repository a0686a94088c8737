"""What the batch kernels share: rows by number, and a panel times TILE vectors, compiled."""

from __future__ import annotations

import numba

from hybrid_kernels.linear.batch_layout import (
    BLOCK,
    COUNT,
    GROUPS,
    INDEX,
    LEVELS,
    OUTPUT_STRIDE,
    PANEL_ROWS,
    ROWS,
    SCALES,
    STARTS,
    STRIDE,
    VECTOR_COLUMNS,
)
from hybrid_kernels.native.memory_access import (
    get_i32,
    get_i64,
    put_i64,
)
from hybrid_kernels.simd.panels import TILE, multiply_byte_tile, multiply_nibble_tile
from hybrid_kernels.simd.vectors import copy_values


@numba.njit(error_model="numpy")
def row_address(arguments: int, row_idx: int) -> int:
    """Address of a row, through the index where there is one."""
    index = get_i64(arguments, INDEX)
    place = row_idx if index == 0 else get_i32(index, row_idx)
    return get_i64(arguments, ROWS) + place * get_i64(arguments, STRIDE)


@numba.njit(error_model="numpy")
def multiply_tile(
    arguments: int,
    tables: int,
    panel: int,
    panel_scales: int,
    token: int,
    first_group: int,
    num_groups: int,
    is_nibbles: bool,
    output: int,
    num_outputs: int,
    adds: bool,
) -> None:
    """A panel of num_groups groups, the vectors' from first_group on, times the vectors token ... token + TILE - 1.

    Vectors beyond the last are the last again. Of eight outputs, num_outputs are wanted; fewer go through a copy.
    """
    width, groups, count = get_i64(arguments, VECTOR_COLUMNS), get_i64(arguments, GROUPS), get_i64(arguments, COUNT)
    group = width // groups
    spare = tables + 4 * 8 * TILE
    for idx in range(TILE):
        vector = min(token + idx, count - 1)
        put_i64(tables, idx, get_i64(arguments, LEVELS) + vector * width + first_group * group)
        put_i64(tables, TILE + idx, get_i64(arguments, SCALES) + (vector * groups + first_group) * 4)
        starts = get_i64(arguments, STARTS) + (vector * width + first_group * group) // BLOCK * 4
        put_i64(tables, 2 * TILE + idx, starts)
        target = output + vector * get_i64(arguments, OUTPUT_STRIDE)
        if num_outputs < PANEL_ROWS:
            copy = spare + 32 * idx
            if adds:
                copy_values(target, copy, num_outputs)
            put_i64(tables, 3 * TILE + idx, copy)
        else:
            put_i64(tables, 3 * TILE + idx, target)
    scales, starts, outputs = tables + 8 * TILE, tables + 16 * TILE, tables + 24 * TILE
    added = 1 if adds else 0
    if is_nibbles:
        multiply_nibble_tile(panel, panel_scales, tables, scales, starts, outputs, num_groups, group // BLOCK, added)
    else:
        multiply_byte_tile(panel, panel_scales, tables, scales, starts, outputs, num_groups, group // BLOCK, added)
    if num_outputs < PANEL_ROWS:
        for idx in range(TILE):
            vector = min(token + idx, count - 1)
            target = output + vector * get_i64(arguments, OUTPUT_STRIDE)
            copy_values(spare + 32 * idx, target, num_outputs)
