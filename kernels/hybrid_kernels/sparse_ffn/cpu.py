"""The sparse feed-forward network for one token, compiled: reads no bundle that is not active, and only rows it needs.

Bound by the bytes of the active bundles. A gate that does not fire spares its up and down rows, an up value that makes
the neuron zero spares its down row. Active neurons are cut into a fixed number of shares, each with an output of its
own, which `sum_shares` adds in order: results do not depend on the number of workers. Down rows wait until there are
MOST_ROWS of them, because the output is read and written once a pass.

The memory must never wait for arithmetic, nor arithmetic for the memory: rows are prefetched in the order in which they
lie, some bundles before they are read, one for each row that is read; also while down rows are added, which then lie in
the worker's cache, and on into the worker's next share.
"""

from __future__ import annotations

import numba
import numpy as np

from hybrid_kernels.native.input_layout import CODE, GROUPS, ROW_SCRATCH_BYTES, VALUE_BYTES, VECTOR_COLUMNS
from hybrid_kernels.native.inputs import prepare_input, row_times_input, row_times_input_ahead, scratch_behind_vector
from hybrid_kernels.native.memory_access import atomic_add, get_f32, get_i32, get_i64, put_f32, put_i32, put_i64
from hybrid_kernels.packed_order import MOST_ROWS
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
    DISK,
    GATE_BIAS,
    HAS_GATE,
    HIDDEN,
    HOMES,
    LIST_SIZE,
    LISTS,
    NEEDED,
    NUM_NEURONS,
    NUM_SHARES,
    NUM_SLOTS,
    READ_ROWS,
    ROW_STRIDE,
    SELECTED,
    SHARES,
    SLOT_SHARES,
    THRESHOLD,
    UP_BIAS,
)
from hybrid_kernels.tiers.disk_reads import wait_for_misses
from hybrid_kernels.tiers.layout import TIER_BITS

FACTORS_OFFSET = 8 * MOST_ROWS  # of a worker's memory for rows: behind the waiting rows' addresses
AHEADS_OFFSET = FACTORS_OFFSET + 4 * MOST_ROWS
QUEUE_OFFSET = AHEADS_OFFSET + 8 * MOST_ROWS
ADD_OFFSET = QUEUE_OFFSET + 64  # int8_add_rows's scratch
assert ADD_OFFSET + SCRATCH_BYTES <= ROW_SCRATCH_BYTES

# int64 words of a worker's queue: the share that it runs, the one after it (once drawn), and the prefetching
TASK, COUNT, SIDE, NEXT_TASK, NEXT_COUNT, AHEAD, ROWS_AHEAD, COUNTER = range(8)


def run_neurons(arguments: int, worker: int, counter: int) -> None:
    """Every share of every network; see the module."""
    num_tasks = get_i64(arguments, NUM_SHARES) * get_i64(arguments, NUM_SLOTS)
    task = atomic_add(counter, 1)
    if task >= num_tasks:
        return
    prepare_input(arguments, worker, 0)
    queue = scratch_behind_vector(arguments, worker) + QUEUE_OFFSET
    put_i64(queue, TASK, task)
    put_i64(queue, SIDE, 0)
    put_i64(queue, COUNT, _list_share(arguments, worker, task, 0))
    put_i64(queue, NEXT_TASK, -1)
    put_i64(queue, AHEAD, 0)
    put_i64(queue, ROWS_AHEAD, _rows_read(arguments))
    put_i64(queue, COUNTER, counter)
    while get_i64(queue, TASK) < num_tasks:
        if get_i64(arguments, DISK) != 0:
            wait_for_misses(get_i64(arguments, DISK), _needed(arguments, get_i64(queue, TASK)))
        y = share_output(arguments, get_i64(queue, TASK))
        fill_zeros(y, 0, get_i64(arguments, VECTOR_COLUMNS))
        _run_listed(arguments, worker, queue, y)
        _draw_next(arguments, worker, queue)
        ahead = get_i64(queue, AHEAD) - get_i64(queue, COUNT) * get_i64(queue, ROWS_AHEAD)
        most_ahead = get_i64(queue, NEXT_COUNT) * get_i64(queue, ROWS_AHEAD)  # past them nothing new was asked for
        put_i64(queue, AHEAD, min(max(ahead, 0), most_ahead))
        put_i64(queue, TASK, get_i64(queue, NEXT_TASK))
        put_i64(queue, COUNT, get_i64(queue, NEXT_COUNT))
        put_i64(queue, SIDE, 1 - get_i64(queue, SIDE))
        put_i64(queue, NEXT_TASK, -1)


@numba.njit(error_model="numpy")
def _draw_next(arguments: int, worker: int, queue: int) -> None:
    """Draw the worker's next share and list its neurons, if that was not done."""
    if get_i64(queue, NEXT_TASK) >= 0:
        return
    task = atomic_add(get_i64(queue, COUNTER), 1)
    put_i64(queue, NEXT_TASK, task)
    if task >= get_i64(arguments, NUM_SHARES) * get_i64(arguments, NUM_SLOTS):
        put_i64(queue, NEXT_COUNT, 0)
    else:
        put_i64(queue, NEXT_COUNT, _list_share(arguments, worker, task, 1 - get_i64(queue, SIDE)))


@numba.njit(error_model="numpy")
def share_output(arguments: int, task: int) -> int:
    """Address of the sum of a share's down rows."""
    slot = task // get_i64(arguments, NUM_SHARES)
    share = task - slot * get_i64(arguments, NUM_SHARES)
    place = slot * get_i64(arguments, SLOT_SHARES) + share
    return get_i64(arguments, SHARES) + place * get_i64(arguments, VECTOR_COLUMNS) * 4


@numba.njit(error_model="numpy")
def _needed(arguments: int, task: int) -> int:
    """Misses that must have arrived before the task's share; none where no list of them is kept."""
    needed = get_i64(arguments, NEEDED)
    return 0 if needed == 0 else get_i64(needed, task)


@numba.njit(error_model="numpy")
def _bundle_of(network: int, neuron: int) -> int:
    """Address of a neuron's bundle."""
    homes = get_i64(network, HOMES)
    if homes != 0:
        return get_i64(homes, neuron) & ~TIER_BITS
    return get_i64(network, DATA) + neuron * get_i64(network, BUNDLE_STRIDE)


@numba.njit(error_model="numpy")
def _network_of(arguments: int, task: int) -> int:
    """Address of the record of the task's network."""
    chosen, slot = get_i64(arguments, CHOSEN), task // get_i64(arguments, NUM_SHARES)
    return get_i64(arguments, BUNDLES) + (0 if chosen == 0 else get_i64(chosen, slot)) * BUNDLE_WORDS * 8


@numba.njit(error_model="numpy")
def _list_of(arguments: int, worker: int, side: int) -> int:
    """Address of one of the worker's two lists of neurons."""
    return get_i64(arguments, LISTS) + (2 * worker + side) * get_i64(arguments, LIST_SIZE) * 4


@numba.njit(error_model="numpy")
def _list_share(arguments: int, worker: int, task: int, side: int) -> int:
    """List the neurons of a task's share, so that each knows those after it; returns how many."""
    listed, num_shares = _list_of(arguments, worker, side), get_i64(arguments, NUM_SHARES)
    slot = task // num_shares
    share = task - slot * num_shares
    if get_i64(arguments, SELECTED) != 0:
        return _list_selected(arguments, listed, slot, share)
    num_neurons = get_i64(arguments, NUM_NEURONS)
    first = num_neurons * share // num_shares
    count = num_neurons * (share + 1) // num_shares - first
    for idx in range(count):
        put_i32(listed, idx, first + idx)
    return count


@numba.njit(error_model="numpy")
def _list_selected(arguments: int, listed: int, slot: int, share: int) -> int:
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
    before, num_listed = 0, 0
    for block in range(num_blocks):
        count = get_i64(counts, block)
        for place in range(max(first - before, 0), min(last - before, count)):
            put_i32(listed, num_listed, get_i32(selected, block * block_size + place))
            num_listed += 1
        before += count
        if before >= last:
            break
    return num_listed


@numba.njit(error_model="numpy")
def _rows_read(arguments: int) -> int:
    """How many of a bundle's rows are most likely read: only the gate where nothing predicts that it fires."""
    if get_i64(arguments, HAS_GATE) == 0:
        return 2
    kind, threshold = get_i64(arguments, ACTIVATION), get_f32(arguments, 2 * THRESHOLD)
    return 3 if get_i64(arguments, SELECTED) != 0 or not is_silenced(kind, threshold, np.float32(-1.0)) else 1


@numba.njit(error_model="numpy")
def _next_ahead(arguments: int, worker: int, queue: int, passed: int) -> int:
    """Address of the next row to prefetch. passed: rows of the share that were read or are being read."""
    ahead = max(get_i64(queue, AHEAD), passed)
    put_i64(queue, AHEAD, ahead + 1)
    rows_ahead, side = get_i64(queue, ROWS_AHEAD), get_i64(queue, SIDE)
    task, count = get_i64(queue, TASK), get_i64(queue, COUNT)
    idx = ahead // rows_ahead
    part = ahead - idx * rows_ahead
    if idx >= count:
        _draw_next(arguments, worker, queue)
        next_count = get_i64(queue, NEXT_COUNT)
        if next_count == 0:
            idx = count - 1  # nothing is left: a row that is at hand
        else:
            idx = min(idx - count, next_count - 1)
            task, side = get_i64(queue, NEXT_TASK), 1 - side
    network, neuron = _network_of(arguments, task), get_i32(_list_of(arguments, worker, side), idx)
    return _bundle_of(network, neuron) + part * get_i64(network, ROW_STRIDE)


@numba.njit(error_model="numpy")
def _values_of(arguments: int, task: int) -> int:
    """Address of float32 [NUM_NEURONS] that neurons' values go to, instead of their down rows into a sum; 0: none."""
    values, slot = get_i64(arguments, HIDDEN), task // get_i64(arguments, NUM_SHARES)
    return 0 if values == 0 else values + slot * get_i64(arguments, NUM_NEURONS) * 4


@numba.njit(error_model="numpy")
def _keep_value(values: int, neuron: int, value: float) -> bool:
    """Whether values are kept; if so, this one is."""
    if values == 0:
        return False
    put_f32(values, neuron, value)
    return True


@numba.njit(error_model="numpy")
def _run_listed(arguments: int, worker: int, queue: int, y: int) -> None:
    """The neurons of the worker's share.

    Every row that is read prefetches one of the rows ahead, in the order in which they lie in memory.
    """
    network = _network_of(arguments, get_i64(queue, TASK))
    listed, count = _list_of(arguments, worker, get_i64(queue, SIDE)), get_i64(queue, COUNT)
    row_stride, values = get_i64(network, ROW_STRIDE), _values_of(arguments, get_i64(queue, TASK))
    gate_bias, up_bias = get_i64(network, GATE_BIAS), get_i64(network, UP_BIAS)
    kind, threshold = get_i64(arguments, ACTIVATION), get_f32(arguments, 2 * THRESHOLD)
    has_gate, rows_ahead = get_i64(arguments, HAS_GATE), get_i64(queue, ROWS_AHEAD)
    waiting_rows = scratch_behind_vector(arguments, worker)
    waiting, num_gates, num_ups, num_downs = 0, 0, 0, 0
    for idx in range(count):
        neuron = get_i32(listed, idx)
        row, gate = _bundle_of(network, neuron), np.float32(0.0)
        _keep_value(values, neuron, np.float32(0.0))
        passed = rows_ahead * idx + 1
        if has_gate != 0:
            gate = row_times_input(arguments, worker, row, _next_ahead(arguments, worker, queue, passed))
            passed += 1
            if gate_bias != 0:
                gate += get_f32(gate_bias, neuron)
            num_gates += 1
            if is_silenced(kind, threshold, gate):
                continue
            row += row_stride
        ahead = row + row_stride if rows_ahead == 1 else _next_ahead(arguments, worker, queue, passed)
        if get_i64(queue, AHEAD) <= rows_ahead * (idx + 1):  # nothing is ahead yet: an up row's time is two rows' too
            further = _next_ahead(arguments, worker, queue, passed)
            up = row_times_input_ahead(arguments, worker, row, ahead, further)
        else:
            up = row_times_input(arguments, worker, row, ahead)
        if up_bias != 0:
            up += get_f32(up_bias, neuron)
        num_ups += 1
        hidden = activate(kind, gate, up)
        if hidden == 0.0 or _keep_value(values, neuron, np.float32(hidden)):
            continue
        num_downs += 1
        put_i64(waiting_rows, waiting, row + row_stride)
        put_f32(waiting_rows + FACTORS_OFFSET, waiting, np.float32(hidden))
        waiting += 1
        if waiting == MOST_ROWS:
            _add_waiting(arguments, worker, queue, y, waiting, rows_ahead * (idx + 1))
            waiting = 0
    if waiting > 0:
        _add_waiting(arguments, worker, queue, y, waiting, rows_ahead * count)
    read_rows = get_i64(arguments, READ_ROWS) + worker * 64
    put_i64(read_rows, 0, get_i64(read_rows, 0) + num_gates)
    put_i64(read_rows, 1, get_i64(read_rows, 1) + num_ups)
    put_i64(read_rows, 2, get_i64(read_rows, 2) + num_downs)


@numba.njit(error_model="numpy")
def _add_waiting(arguments: int, worker: int, queue: int, y: int, waiting: int, passed: int) -> None:
    """Add the down rows that wait, each times its neuron's value, to y."""
    rows = scratch_behind_vector(arguments, worker)
    factors, aheads = rows + FACTORS_OFFSET, rows + AHEADS_OFFSET
    code, groups, value_bytes = get_i64(arguments, CODE), get_i64(arguments, GROUPS), get_i64(arguments, VALUE_BYTES)
    multiple = 2 if code >= FIRST_QUANTIZED else 4
    padded = (waiting + multiple - 1) // multiple * multiple
    for idx in range(waiting, padded):
        put_i64(rows, idx, get_i64(rows, 0))
        put_f32(factors, idx, np.float32(0.0))
    if code >= FIRST_QUANTIZED:
        for idx in range(padded):
            put_i64(aheads, idx, _next_ahead(arguments, worker, queue, passed))
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
