"""The sparse feed-forward network for one token, compiled: reads no bundle that is not active, and only rows it needs.

Bound by the bytes of the active bundles. A gate that does not fire spares its up and down rows, an up value that makes
the neuron zero spares its down row. Active neurons are cut into a fixed number of shares, each with an output of its
own, which `sum_shares` adds in order: results do not depend on the number of workers. Down rows wait until there are
MOST_ROWS of them, because the output is read and written once a pass.
"""

from __future__ import annotations

import numba
import numpy as np

from hybrid_kernels.native.input_layout import CODE, GROUPS, MOST_ROWS, ROW_SCRATCH_BYTES, VALUE_BYTES, VECTOR_COLUMNS
from hybrid_kernels.native.inputs import prepare_input, row_times_input, row_times_input_ahead, scratch_behind_vector
from hybrid_kernels.native.memory_access import atomic_add, get_f32, get_i32, get_i64, put_f32, put_i32, put_i64
from hybrid_kernels.row_codes import FIRST_QUANTIZED
from hybrid_kernels.simd.float_rows import row_axpy4
from hybrid_kernels.simd.int8_add import SCRATCH_BYTES, int8_add_rows
from hybrid_kernels.simd.vectors import fill_zeros
from hybrid_kernels.sparse_ffn.cpu_activation import activate, is_silenced
from hybrid_kernels.sparse_ffn.layout import (
    ACTIVATION,
    BLOCK,
    BUNDLE_STRIDE,
    BUNDLE_WORDS,
    BUNDLES,
    CHOSEN,
    COUNTS,
    DATA,
    GATE_BIAS,
    HAS_GATE,
    NUM_NEURONS,
    NUM_SHARES,
    NUM_SLOTS,
    READ_ROWS,
    ROW_STRIDE,
    SELECTED,
    SHARES,
    THRESHOLD,
    UP_BIAS,
)

LIST_OFFSET = 3072  # behind the waiting rows' addresses, factors and int8_add_rows's scratch
MOST_LISTED = (ROW_SCRATCH_BYTES - LIST_OFFSET) // 4
assert 12 * MOST_ROWS + SCRATCH_BYTES <= LIST_OFFSET


def run_neurons(arguments: int, worker: int, counter: int) -> None:
    """Every share of every network; see the module."""
    num_shares = get_i64(arguments, NUM_SHARES)
    is_prepared = False
    while True:
        task = atomic_add(counter, 1)
        if task >= num_shares * get_i64(arguments, NUM_SLOTS):
            return
        if not is_prepared:
            prepare_input(arguments, worker, 0)
            is_prepared = True
        slot = task // num_shares
        _run_share(arguments, worker, slot, task - slot * num_shares)


@numba.njit(error_model="numpy")
def _run_share(arguments: int, worker: int, slot: int, share: int) -> None:
    num_shares, width = get_i64(arguments, NUM_SHARES), get_i64(arguments, VECTOR_COLUMNS)
    y = get_i64(arguments, SHARES) + (slot * num_shares + share) * width * 4
    fill_zeros(y, 0, width)
    chosen = get_i64(arguments, CHOSEN)
    network = get_i64(arguments, BUNDLES) + (0 if chosen == 0 else get_i64(chosen, slot)) * BUNDLE_WORDS * 8
    if get_i64(arguments, SELECTED) == 0:
        num_neurons = get_i64(arguments, NUM_NEURONS)
        first, last = num_neurons * share // num_shares, num_neurons * (share + 1) // num_shares
        _run_range(arguments, worker, network, y, first, last)
    else:
        _run_selected(arguments, worker, network, y, slot, share)


@numba.njit(error_model="numpy")
def _run_range(arguments: int, worker: int, network: int, y: int, first: int, last: int) -> None:
    waiting = 0
    for neuron in range(first, last):
        waiting = _run_neuron(arguments, worker, network, y, neuron, neuron + 1, waiting)
    if waiting > 0:
        _add_waiting(arguments, worker, y, waiting)


@numba.njit(error_model="numpy")
def _run_selected(arguments: int, worker: int, network: int, y: int, slot: int, share: int) -> None:
    """The share's part of the selected neurons, which lie in blocks with gaps between them."""
    num_neurons, block_size = get_i64(arguments, NUM_NEURONS), get_i64(arguments, BLOCK)
    num_blocks = (num_neurons + block_size - 1) // block_size
    counts = get_i64(arguments, COUNTS) + slot * num_blocks * 8
    selected = get_i64(arguments, SELECTED) + slot * num_neurons * 4
    total = 0
    for block in range(num_blocks):
        total += get_i64(counts, block)
    num_shares = get_i64(arguments, NUM_SHARES)
    first, last = total * share // num_shares, total * (share + 1) // num_shares
    listed = scratch_behind_vector(arguments, worker) + LIST_OFFSET
    before, waiting, num_listed = 0, 0, 0
    for block in range(num_blocks):
        count = get_i64(counts, block)
        for place in range(max(first - before, 0), min(last - before, count)):
            put_i32(listed, num_listed, get_i32(selected, block * block_size + place))
            num_listed += 1
            if num_listed == MOST_LISTED:
                waiting = _run_listed(arguments, worker, network, y, listed, num_listed, waiting)
                num_listed = 0
        before += count
        if before >= last:
            break
    waiting = _run_listed(arguments, worker, network, y, listed, num_listed, waiting)
    if waiting > 0:
        _add_waiting(arguments, worker, y, waiting)


@numba.njit(error_model="numpy")
def _run_listed(arguments: int, worker: int, network: int, y: int, listed: int, num_listed: int, waiting: int) -> int:
    """Neurons by number, side by side so that each knows the one after it; returns how many down rows wait."""
    for idx in range(num_listed):
        following = get_i32(listed, min(idx + 1, num_listed - 1))
        waiting = _run_neuron(arguments, worker, network, y, get_i32(listed, idx), following, waiting)
    return waiting


@numba.njit(error_model="numpy")
def _run_neuron(arguments: int, worker: int, network: int, y: int, neuron: int, following: int, waiting: int) -> int:
    """Gate, up, and the down row put among those that wait; returns how many do. following: the neuron after it."""
    bundle_stride, row_stride = get_i64(network, BUNDLE_STRIDE), get_i64(network, ROW_STRIDE)
    row = get_i64(network, DATA) + neuron * bundle_stride
    next_bundle = get_i64(network, DATA) + following * bundle_stride
    kind, threshold = get_i64(arguments, ACTIVATION), get_f32(arguments, 2 * THRESHOLD)
    read_rows = get_i64(arguments, READ_ROWS)
    gate = np.float32(0.0)
    if get_i64(arguments, HAS_GATE) != 0:
        if get_i64(arguments, SELECTED) != 0 or not is_silenced(kind, threshold, np.float32(-1.0)):
            gate = row_times_input(arguments, worker, row, row + row_stride)
        else:
            gate = row_times_input(arguments, worker, row, next_bundle)
        if get_i64(network, GATE_BIAS) != 0:
            gate += get_f32(get_i64(network, GATE_BIAS), neuron)
        put_i64(read_rows, worker * 8, get_i64(read_rows, worker * 8) + 1)
        if is_silenced(kind, threshold, gate):
            return waiting
        row += row_stride
    up = row_times_input_ahead(arguments, worker, row, row + row_stride, next_bundle)
    if get_i64(network, UP_BIAS) != 0:
        up += get_f32(get_i64(network, UP_BIAS), neuron)
    put_i64(read_rows, worker * 8 + 1, get_i64(read_rows, worker * 8 + 1) + 1)
    hidden = activate(kind, gate, up)
    if hidden == 0.0:
        return waiting
    put_i64(read_rows, worker * 8 + 2, get_i64(read_rows, worker * 8 + 2) + 1)
    behind = scratch_behind_vector(arguments, worker)
    put_i64(behind, waiting, row + row_stride)
    put_f32(behind + 8 * MOST_ROWS, waiting, np.float32(hidden))
    waiting += 1
    if waiting == MOST_ROWS:
        _add_waiting(arguments, worker, y, waiting)
        waiting = 0
    return waiting


@numba.njit(error_model="numpy")
def _add_waiting(arguments: int, worker: int, y: int, waiting: int) -> None:
    """Add the down rows that wait, each times its neuron's value, to y."""
    rows = scratch_behind_vector(arguments, worker)
    factors = rows + 8 * MOST_ROWS
    code, groups, value_bytes = get_i64(arguments, CODE), get_i64(arguments, GROUPS), get_i64(arguments, VALUE_BYTES)
    multiple = 2 if code >= FIRST_QUANTIZED else 4
    padded = (waiting + multiple - 1) // multiple * multiple
    for idx in range(waiting, padded):
        put_i64(rows, idx, get_i64(rows, 0))
        put_f32(factors, idx, np.float32(0.0))
    if code >= FIRST_QUANTIZED:
        int8_add_rows(code, rows, factors, padded // 2, y, groups, value_bytes, factors + 4 * MOST_ROWS)
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
