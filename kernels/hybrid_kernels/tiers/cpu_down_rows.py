"""Down rows of neurons whose values are known, compiled: where a layer's results merge before the down projection.

The twin of what the GPU does then, over its own copies of the down rows. Shares and their order are `run_neurons`'s.
"""

from __future__ import annotations

import numba
import numpy as np

from hybrid_kernels.native.input_layout import CODE, GROUPS, VALUE_BYTES, VECTOR_COLUMNS
from hybrid_kernels.native.inputs import scratch_behind_vector
from hybrid_kernels.native.memory_access import atomic_add, get_f32, get_i32, get_i64, put_f32, put_i64
from hybrid_kernels.packed_order import MOST_ROWS
from hybrid_kernels.row_codes import FIRST_QUANTIZED
from hybrid_kernels.simd.float_rows import row_axpy4
from hybrid_kernels.simd.int8_add import int8_add_rows
from hybrid_kernels.simd.vectors import fill_zeros
from hybrid_kernels.sparse_ffn.cpu import ADD_OFFSET, AHEADS_OFFSET, FACTORS_OFFSET, share_output
from hybrid_kernels.sparse_ffn.layout import CHOSEN, HIDDEN, NUM_NEURONS, NUM_SHARES, NUM_SLOTS, READ_ROWS
from hybrid_kernels.tiers.layout import DOWN_COUNTS, DOWN_HOMES, DOWN_SELECTED


def run_down(arguments: int, worker: int, counter: int) -> None:
    """Every share of every network's listed neurons."""
    num_shares = get_i64(arguments, NUM_SHARES)
    num_tasks = num_shares * get_i64(arguments, NUM_SLOTS)
    while True:
        task = atomic_add(counter, 1)
        if task >= num_tasks:
            return
        slot = task // num_shares
        share = task - slot * num_shares
        y = share_output(arguments, task)
        fill_zeros(y, 0, get_i64(arguments, VECTOR_COLUMNS))
        count = get_i64(get_i64(arguments, DOWN_COUNTS), slot)
        _add_share(arguments, worker, slot, count * share // num_shares, count * (share + 1) // num_shares, y)


@numba.njit(error_model="numpy")
def _add_share(arguments: int, worker: int, slot: int, first: int, last: int, y: int) -> None:
    num_neurons, chosen = get_i64(arguments, NUM_NEURONS), get_i64(arguments, CHOSEN)
    network = 0 if chosen == 0 else get_i64(chosen, slot)
    homes = get_i64(get_i64(arguments, DOWN_HOMES), network)
    values = get_i64(arguments, HIDDEN) + slot * num_neurons * 4
    listed = get_i64(arguments, DOWN_SELECTED) + slot * num_neurons * 4
    rows = scratch_behind_vector(arguments, worker)
    waiting, num_rows = 0, 0
    for place in range(first, last):
        neuron = get_i32(listed, place)
        value = get_f32(values, neuron)
        if value == 0.0:
            continue
        put_i64(rows, waiting, get_i64(homes, neuron))
        put_f32(rows + FACTORS_OFFSET, waiting, value)
        waiting += 1
        num_rows += 1
        if waiting == MOST_ROWS:
            _add_rows(arguments, rows, waiting, y)
            waiting = 0
    if waiting > 0:
        _add_rows(arguments, rows, waiting, y)
    read_rows = get_i64(arguments, READ_ROWS) + worker * 64
    put_i64(read_rows, 2, get_i64(read_rows, 2) + num_rows)
    put_i64(read_rows, 3, get_i64(read_rows, 3) + num_rows)


@numba.njit(error_model="numpy")
def _add_rows(arguments: int, rows: int, waiting: int, y: int) -> None:
    """rows: memory with addresses of `waiting` rows, and further on their factors."""
    code, groups, value_bytes = get_i64(arguments, CODE), get_i64(arguments, GROUPS), get_i64(arguments, VALUE_BYTES)
    factors, aheads = rows + FACTORS_OFFSET, rows + AHEADS_OFFSET
    multiple = 2 if code >= FIRST_QUANTIZED else 4
    padded = (waiting + multiple - 1) // multiple * multiple
    for idx in range(waiting, padded):
        put_i64(rows, idx, get_i64(rows, 0))
        put_f32(factors, idx, np.float32(0.0))
    if code >= FIRST_QUANTIZED:
        for idx in range(padded):
            put_i64(aheads, idx, get_i64(rows, idx))
        int8_add_rows(code, rows, factors, padded // 2, y, groups, value_bytes, rows + ADD_OFFSET, aheads)
        return
    for idx in range(0, padded, 4):
        row_axpy4(
            code,
            get_i64(rows, idx),
            get_i64(rows, idx + 1),
            get_i64(rows, idx + 2),
            get_i64(rows, idx + 3),
            get_f32(factors, idx),
            get_f32(factors, idx + 1),
            get_f32(factors, idx + 2),
            get_f32(factors, idx + 3),
            y,
            groups,
            value_bytes,
        )
