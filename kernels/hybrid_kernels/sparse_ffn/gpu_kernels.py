"""The GPU's kernels behind gpu.py, in the order in which they run."""

from __future__ import annotations

import triton
import triton.language as tl

from hybrid_kernels.linear.gpu_rows import row_products, tile, tile_columns
from hybrid_kernels.sparse_ffn.gpu_rows import activated


@triton.jit
def select_kernel(selected, neurons, num_selected, num_neurons, num_tokens, BLOCK: tl.constexpr, TOKENS: tl.constexpr):
    """selected: int8 [T, I], per token; writes the union's neurons ascending, int32 [I], and their number, int32 [1].

    One program: sixteen thousand neurons are sixteen steps, and there is nothing to agree on.
    """
    token = tl.arange(0, TOKENS)
    count = 0
    for first in range(0, num_neurons, BLOCK):
        neuron = first + tl.arange(0, BLOCK)
        mask = (token < num_tokens)[:, None] & (neuron < num_neurons)[None, :]
        each = tl.load(selected + token[:, None].to(tl.int64) * num_neurons + neuron[None, :], mask, 0)
        is_in = (tl.max(each.to(tl.int32), axis=0) > 0).to(tl.int32)
        place = count + tl.cumsum(is_in, axis=0) - is_in
        tl.store(neurons + place, neuron, is_in > 0)
        count += tl.sum(is_in, axis=0)
    tl.store(num_selected, count)


@triton.jit
def gate_and_up_kernel(
    x,
    values,
    scales,
    gate_bias,
    up_bias,
    selected,
    neurons,
    num_selected,
    hidden,
    num_neurons,
    num_tokens,
    value_stride,
    scale_stride,
    part_values,
    part_scales,
    threshold,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """hidden: float32 [I, TOKENS], row p has the values of neurons[p]; zeros for tokens that did not select it.

    part_values, part_scales: from a bundle's row to its next one.
    """
    length = tl.load(num_selected)
    first = tl.program_id(0) * BLOCK
    if first >= length:
        return
    place = first + tl.arange(0, BLOCK)
    in_rows = place < length
    neuron = tl.load(neurons + place, in_rows, 0).to(tl.int64)
    token = tl.arange(0, TOKENS)
    in_tokens = token < num_tokens
    value_start, scale_start = neuron * value_stride, neuron * scale_stride
    if HAS_GATE:
        gate = row_products(
            x, COLUMNS, values, scales, value_start, scale_start, in_rows, token, in_tokens, COLUMNS, KIND, GROUP, CHUNK
        )
        value_start += part_values
        scale_start += part_scales
    up = row_products(
        x, COLUMNS, values, scales, value_start, scale_start, in_rows, token, in_tokens, COLUMNS, KIND, GROUP, CHUNK
    )
    if HAS_BIAS:
        up += tl.load(up_bias + neuron, in_rows, 0.0)[:, None]
        if HAS_GATE:
            gate += tl.load(gate_bias + neuron, in_rows, 0.0)[:, None]
    value = activated(gate if HAS_GATE else up, up, threshold, ACTIVATION)
    mask = in_rows[:, None] & in_tokens[None, :]
    own = tl.load(selected + token[None, :].to(tl.int64) * num_neurons + neuron[:, None], mask, 0)
    at = place[:, None] * TOKENS + token[None, :]
    tl.store(hidden + at, tl.where(own > 0, value, 0.0), in_rows[:, None])


@triton.jit
def down_kernel(
    hidden,
    values,
    scales,
    neurons,
    num_selected,
    partial,
    value_stride,
    scale_stride,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """values, scales: from the first down row on; partial: float32 [splits, TOKENS, COLUMNS], written whole."""
    length = tl.load(num_selected)
    first_column, split = tl.program_id(0) * CHUNK, tl.program_id(1)
    token = tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, CHUNK), tl.float32)
    for first in range(split * BLOCK, length, tl.num_programs(1) * BLOCK):
        place = first + tl.arange(0, BLOCK)
        in_rows = place < length
        neuron = tl.load(neurons + place, in_rows, 0).to(tl.int64)
        value = tl.load(hidden + place[None, :] * TOKENS + token[:, None], in_rows[None, :], 0.0)  # [TOKENS, BLOCK]
        fires = in_rows & (tl.max(tl.abs(value), axis=0) > 0)  # a neuron that came out as zero is not read
        weights = tile(
            values,
            scales,
            neuron * value_stride,
            neuron * scale_stride,
            fires,
            first_column,
            COLUMNS,
            KIND,
            GROUP,
            CHUNK,
        )
        if GROUP > 0:  # tf32: as exact as float16, and products of activations may be beyond that
            total += tl.dot(value, weights.to(tl.float32), input_precision="tf32")
        else:
            total += tl.dot(value, weights, input_precision="ieee")
    column = tile_columns(first_column, CHUNK, KIND, GROUP)
    at = (split * TOKENS + token[:, None]).to(tl.int64) * COLUMNS + column[None, :]
    tl.store(partial + at, total, (column < COLUMNS)[None, :] & (token < TOKENS)[:, None])


@triton.jit
def merge_kernel(
    partial,
    bias,
    cold,
    residual,
    y,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_COLD: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """y, cold, residual: float32 [T, COLUMNS]. The sum of the splits, in their order, then what the CPU computed."""
    column = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    token = tl.program_id(1)
    mask = column < COLUMNS
    total = tl.zeros((CHUNK,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(partial + (split * TOKENS + token).to(tl.int64) * COLUMNS + column, mask, 0.0)
    at = token.to(tl.int64) * COLUMNS + column
    if HAS_COLD:
        total += tl.load(cold + at, mask, 0.0)
    if HAS_BIAS:
        total += tl.load(bias + column, mask, 0.0)
    if HAS_RESIDUAL:
        total += tl.load(residual + at, mask, 0.0)
    tl.store(y + at, total, mask)
