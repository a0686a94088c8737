"""The GPU's kernels behind gpu.py, in the order in which they run.

A *pair* is a token and one of the networks it goes to: program_id tells which, `experts` its network. Every pair has
lists and sums of its own, so that no host has to know where a token goes. Vectors are single, and lie in the first lane
of a tensor core's operand: the others would be idle.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybrid_kernels.linear.gpu_rows import row_products, tile, tile_columns
from hybrid_kernels.sparse_ffn.gpu_rows import activated


@triton.jit
def expert_linear_kernel(
    x,
    values,
    scales,
    bias,
    experts,
    y,
    num_rows,
    expert_values,
    expert_scales,
    value_stride,
    scale_stride,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """y: float32 [P, num_rows], each pair's vector times its network's matrix. values, scales: the first network's
    rows, less than 2**31 of either; expert_values, expert_scales: from there to the next's; x: float32
    [P / SHARED, COLUMNS]; bias: float32 [E, num_rows].
    """
    pair = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows = row < num_rows
    expert = tl.load(experts + pair).to(tl.int64)
    lane = tl.arange(0, LANES)
    vector = x + (pair // SHARED).to(tl.int64) * COLUMNS
    products = row_products(
        vector,
        COLUMNS,
        values,
        scales,
        expert * expert_values + row * value_stride,
        expert * expert_scales + row * scale_stride,
        in_rows,
        lane,
        lane < 1,
        COLUMNS,
        KIND,
        GROUP,
        CHUNK,
    )
    total = tl.sum(products, axis=1)  # of one lane and zeros
    if HAS_BIAS:
        total += tl.load(bias + expert * num_rows + row, in_rows, 0.0)
    if HAS_RELU:
        total = tl.maximum(total, 0.0)
    tl.store(y + pair.to(tl.int64) * num_rows + row, total, in_rows)


@triton.jit
def split_kernel(
    logits,
    rows,
    experts,
    hot,
    hot_counts,
    cold,
    cold_counts,
    all_hot,
    num_neurons,
    threshold,
    HAS_LOGITS: tl.constexpr,
    ADDS_UP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """hot, cold: int32 [P, I], each pair's active neurons with a row of rows, int32 [E, I], and those with none (-1).

    In the neurons' order; hot_counts, cold_counts: [P]; all_hot: int64 [1]. A program a pair: some dozen steps.
    """
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(experts + pair).to(tl.int64)
    num_hot, num_cold = 0, 0
    for first in range(0, num_neurons, BLOCK):
        neuron = first + tl.arange(0, BLOCK)
        active = neuron < num_neurons
        row = tl.load(rows + expert * num_neurons + neuron, active, -1)
        if HAS_LOGITS:
            logit = tl.load(logits + pair * num_neurons + neuron, active, float("-inf"))
            active = active & (logit > threshold)
        is_hot, is_cold = (active & (row >= 0)).to(tl.int32), (active & (row < 0)).to(tl.int32)
        place = num_hot + tl.cumsum(is_hot, axis=0) - is_hot
        tl.store(hot + pair * num_neurons + place, neuron, is_hot > 0)
        place = num_cold + tl.cumsum(is_cold, axis=0) - is_cold
        tl.store(cold + pair * num_neurons + place, neuron, is_cold > 0)
        num_hot += tl.sum(is_hot, axis=0)
        num_cold += tl.sum(is_cold, axis=0)
    tl.store(hot_counts + pair, num_hot)
    tl.store(cold_counts + pair, num_cold)
    if ADDS_UP:  # in any order: whole numbers
        tl.atomic_add(all_hot, num_hot)


@triton.jit
def values_kernel(
    x,
    values,
    scales,
    gate_bias,
    up_bias,
    rows,
    experts,
    listed,
    counts,
    hidden,
    num_neurons,
    value_stride,
    scale_stride,
    part_values,
    part_scales,
    threshold,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """hidden: float32 [P, I], at a neuron's number the value of each that the pair's list has. counts: int32 [P].

    values, scales: bundles, of which a neuron's is where rows say; part_values, part_scales: from a row to its next.
    """
    pair = tl.program_id(1).to(tl.int64)
    length = tl.load(counts + pair)
    first = tl.program_id(0) * BLOCK
    if first >= length:
        return
    place = first + tl.arange(0, BLOCK)
    in_rows = place < length
    neuron = tl.load(listed + pair * num_neurons + place, in_rows, 0)
    of_all = tl.load(experts + pair).to(tl.int64) * num_neurons + neuron
    row = tl.load(rows + of_all, in_rows, 0).to(tl.int64)
    lane = tl.arange(0, LANES)
    vector = x + (tl.program_id(1) // SHARED).to(tl.int64) * COLUMNS
    start, scale_start = row * value_stride, row * scale_stride
    if HAS_GATE:
        products = row_products(
            vector, COLUMNS, values, scales, start, scale_start, in_rows, lane, lane < 1, COLUMNS, KIND, GROUP, CHUNK
        )
        gate = tl.sum(products, axis=1)
        start += part_values
        scale_start += part_scales
    products = row_products(
        vector, COLUMNS, values, scales, start, scale_start, in_rows, lane, lane < 1, COLUMNS, KIND, GROUP, CHUNK
    )
    up = tl.sum(products, axis=1)
    if HAS_BIAS:
        up += tl.load(up_bias + of_all, in_rows, 0.0)
        if HAS_GATE:
            gate += tl.load(gate_bias + of_all, in_rows, 0.0)
    value = activated(gate if HAS_GATE else up, up, threshold, ACTIVATION)
    tl.store(hidden + pair * num_neurons + neuron, value, in_rows)


@triton.jit
def down_rows_kernel(
    hidden,
    values,
    scales,
    rows,
    experts,
    listed,
    counts,
    partial,
    num_neurons,
    value_stride,
    scale_stride,
    first_split,
    num_splits,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """partial: float32 [P, num_splits, COLUMNS], of which those from first_split on are written whole, one a program.

    values, scales: from the first down row on; hidden: float32 [P, I], by a neuron's number.
    """
    pair, split = tl.program_id(2).to(tl.int64), tl.program_id(1)
    length = tl.load(counts + pair).to(tl.int32)
    first_column = tl.program_id(0) * CHUNK
    expert = tl.load(experts + pair).to(tl.int64)
    lane = tl.arange(0, LANES)
    total = tl.zeros((LANES, CHUNK), tl.float32)
    for first in range(split * BLOCK, length, tl.num_programs(1) * BLOCK):
        place = first + tl.arange(0, BLOCK)
        in_rows = place < length
        neuron = tl.load(listed + pair * num_neurons + place, in_rows, 0)
        value = tl.load(hidden + pair * num_neurons + neuron, in_rows, 0.0)
        fires = in_rows & (value != 0)  # a neuron that came out as zero is not read
        row = tl.load(rows + expert * num_neurons + neuron, fires, 0).to(tl.int64)
        weights = tile(
            values, scales, row * value_stride, row * scale_stride, fires, first_column, COLUMNS, KIND, GROUP, CHUNK
        )
        vector = tl.where((lane < 1)[:, None], value[None, :], 0.0)  # [LANES, BLOCK]
        if GROUP > 0:  # tf32: as exact as float16, and products of activations may be beyond that
            total += tl.dot(vector, weights.to(tl.float32), input_precision="tf32")
        else:
            total += tl.dot(vector, weights, input_precision="ieee")
    column = tile_columns(first_column, CHUNK, KIND, GROUP)
    at = (pair * num_splits + first_split + split) * COLUMNS + column
    tl.store(partial + at, tl.sum(total, axis=0), column < COLUMNS)


@triton.jit
def merge_tiers_kernel(
    partial,
    expert_weights,
    experts,
    bias,
    cold,
    residual,
    y,
    num_splits,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_COLD: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """y, cold, residual: float32 [T, COLUMNS]; partial: float32 [T * SLOTS, num_splits, COLUMNS]; bias: [E, COLUMNS].

    The pairs' sums times their weights, in the pairs' order; then what the CPU computed, then the residual stream.
    """
    column = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    token = tl.program_id(1).to(tl.int64)
    mask = column < COLUMNS
    total = tl.zeros((CHUNK,), tl.float32)
    for slot in range(SLOTS):
        pair = token * SLOTS + slot
        of_pair = tl.zeros((CHUNK,), tl.float32)
        for split in range(num_splits):
            of_pair += tl.load(partial + (pair * num_splits + split) * COLUMNS + column, mask, 0.0)
        if HAS_BIAS:
            expert = tl.load(experts + pair).to(tl.int64)
            of_pair += tl.load(bias + expert * COLUMNS + column, mask, 0.0)
        total += of_pair * tl.load(expert_weights + pair)
    at = token * COLUMNS + column
    if HAS_COLD:
        total += tl.load(cold + at, mask, 0.0)
    if HAS_RESIDUAL:
        total += tl.load(residual + at, mask, 0.0)
    tl.store(y + at, total, mask)
