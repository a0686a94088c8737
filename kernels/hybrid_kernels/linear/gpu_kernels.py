"""The GPU's kernel behind gpu.py."""

from __future__ import annotations

import triton
import triton.language as tl

from hybrid_kernels.linear.gpu_rows import row_products, tile, tile_columns


@triton.jit
def linear_kernel(
    x,
    values,
    scales,
    bias,
    y,
    num_rows,
    num_vectors,
    value_stride,
    scale_stride,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """x: float32 [T, COLUMNS]; values, scales: of the rows, strides in their own types; y: float32 [T, N]."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    vector = tl.program_id(1) * BLOCK_VECTORS + tl.arange(0, BLOCK_VECTORS)
    in_rows, in_vectors = row < num_rows, vector < num_vectors
    value_start, scale_start = row.to(tl.int64) * value_stride, row.to(tl.int64) * scale_stride
    total = row_products(
        x, COLUMNS, values, scales, value_start, scale_start, in_rows, vector, in_vectors, COLUMNS, KIND, GROUP, CHUNK
    )
    if HAS_BIAS:
        total += tl.load(bias + row, in_rows, 0.0)[:, None]
    at = vector[None, :].to(tl.int64) * num_rows + row[:, None]
    tl.store(y + at, total, in_rows[:, None] & in_vectors[None, :])


@triton.jit
def dequantize_kernel(
    values,
    scales,
    y,
    num_rows,
    value_stride,
    scale_stride,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """y: [N, COLUMNS], of the type that `tile` makes."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows, first = row < num_rows, tl.program_id(1) * CHUNK
    wide = row.to(tl.int64)
    weights = tile(
        values, scales, wide * value_stride, wide * scale_stride, in_rows, first, COLUMNS, KIND, GROUP, CHUNK
    )
    column = tile_columns(first, CHUNK, KIND, GROUP)
    tl.store(y + wide[:, None] * COLUMNS + column[None, :], weights, in_rows[:, None] & (column < COLUMNS)[None, :])
