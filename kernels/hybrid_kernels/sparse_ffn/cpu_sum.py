"""Adding up what workers have made of their shares of the neurons, compiled."""

from __future__ import annotations

import numba
import numpy as np

from hybrid_kernels.native.memory_access import atomic_add, get_f32, get_i32, get_i64, put_f32
from hybrid_kernels.simd.vectors import add_scaled, fill_zeros
from hybrid_kernels.sparse_ffn.layout import (
    SUM_BIASES,
    SUM_BLOCK,
    SUM_CHOSEN,
    SUM_COLUMNS,
    SUM_GROUP,
    SUM_NUM_SHARES,
    SUM_NUM_SLOTS,
    SUM_ORDER,
    SUM_OUTPUT,
    SUM_SCRATCH,
    SUM_SCRATCH_STRIDE,
    SUM_SHARES,
    SUM_VECTOR_COLUMNS,
    SUM_WEIGHTS,
    SUM_X,
)


def sum_shares(arguments: int, worker: int, counter: int) -> None:
    """Output = x + sum over networks of weight * (sum over shares + bias), columns in their own order again."""
    columns = get_i64(arguments, SUM_COLUMNS)
    while True:
        first = atomic_add(counter, 1) * SUM_BLOCK
        if first >= columns:
            return
        _sum_block(arguments, worker, first, min(SUM_BLOCK, get_i64(arguments, SUM_VECTOR_COLUMNS) - first))


@numba.njit(error_model="numpy")
def _sum_block(arguments: int, worker: int, first: int, size: int) -> None:
    """Places first ... first + size - 1 of the packed order, which are whole groups."""
    x, output, columns = get_i64(arguments, SUM_X), get_i64(arguments, SUM_OUTPUT), get_i64(arguments, SUM_COLUMNS)
    width, num_shares = get_i64(arguments, SUM_VECTOR_COLUMNS), get_i64(arguments, SUM_NUM_SHARES)
    total = get_i64(arguments, SUM_SCRATCH) + worker * get_i64(arguments, SUM_SCRATCH_STRIDE)
    weights, num_slots = get_i64(arguments, SUM_WEIGHTS), get_i64(arguments, SUM_NUM_SLOTS)
    fill_zeros(total, 0, size)
    for slot in range(num_slots):
        weight = get_f32(weights, slot) if weights != 0 else np.float32(1.0)
        for share in range(num_shares):
            y = get_i64(arguments, SUM_SHARES) + ((slot * num_shares + share) * width + first) * 4
            add_scaled(y, total, size, weight)
    group, order = get_i64(arguments, SUM_GROUP), get_i64(arguments, SUM_ORDER)
    for place in range(size):
        within = place % group
        column = first + place - within + get_i32(order, within)
        if column < columns:
            put_f32(output, column, get_f32(x, column) + get_f32(total, place))
    _add_biases(arguments, first, min(first + size, columns))


@numba.njit(error_model="numpy")
def _add_biases(arguments: int, first: int, last: int) -> None:
    biases, chosen = get_i64(arguments, SUM_BIASES), get_i64(arguments, SUM_CHOSEN)
    if biases == 0:
        return
    weights, output = get_i64(arguments, SUM_WEIGHTS), get_i64(arguments, SUM_OUTPUT)
    for slot in range(get_i64(arguments, SUM_NUM_SLOTS)):
        bias = get_i64(biases, 0 if chosen == 0 else get_i64(chosen, slot))
        weight = get_f32(weights, slot) if weights != 0 else np.float32(1.0)
        if bias != 0:
            add_scaled(bias + 4 * first, output + 4 * first, last - first, weight)
