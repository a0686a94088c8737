"""A packed matrix times a few vectors on a GPU: rows of any format, as they lie in RAM and on disk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from hybrid_kernels.linear.gpu_kernels import dequantize_kernel, linear_kernel
from hybrid_kernels.packed_matrix import PackedMatrix

LEAST_VECTORS = 16  # of a tensor core's instruction
UNPACKED_ROWS, UNPACKED_COLUMNS = 16, 256  # of one program
MOST_VECTORS = 64  # more is a product of matrices: dequantised once, multiplied densely


@dataclass(frozen=True, slots=True)
class Tiling:
    """block_rows: of one program; chunk: columns that it takes at a time; a power of two each."""

    block_rows: int
    chunk: int
    num_warps: int = 4
    num_stages: int = 3


def linear(
    x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None = None, tiling: Tiling | None = None
) -> torch.Tensor:
    """x: [T, K] float32, contiguous; weight: [N, K]; bias: [N] float32; all on one GPU -> [T, N] float32.

    The same input gives the same bits. Raises ValueError for other shapes or devices, and for more than MOST_VECTORS.
    """
    num_vectors, columns = x.shape
    if columns != weight.columns or x.dtype != torch.float32 or not x.is_contiguous():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, expected contiguous float32 [T, {weight.columns}]")
    if num_vectors > MOST_VECTORS:
        raise ValueError(f"x has {num_vectors} vectors, expected at most {MOST_VECTORS}: dequantise and multiply")
    if x.device != weight.rows.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.rows.device}")
    y = torch.empty(num_vectors, weight.num_rows, device=x.device)
    if y.numel() == 0:
        return y
    tiling = tiling or default_tiling(weight)
    values, scales = row_views(weight)
    vectors = max(LEAST_VECTORS, triton.next_power_of_2(num_vectors))
    linear_kernel[(triton.cdiv(weight.num_rows, tiling.block_rows), 1)](
        x,
        values,
        scales,
        x if bias is None else bias,
        y,
        weight.num_rows,
        num_vectors,
        values.stride(0),
        scales.stride(0),
        COLUMNS=columns,
        KIND=weight.row_format.kind,
        GROUP=weight.row_format.group,
        HAS_BIAS=bias is not None,
        BLOCK_ROWS=tiling.block_rows,
        BLOCK_VECTORS=vectors,
        CHUNK=tiling.chunk,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    return y


def dequantize(weight: PackedMatrix) -> torch.Tensor:
    """weight: [N, K] on a GPU -> [N, K], float16 of quantised rows (a level times a scale rounded), else float32."""
    dtype = torch.float16 if weight.row_format.is_quantized else torch.float32
    y = torch.empty(weight.num_rows, weight.columns, dtype=dtype, device=weight.rows.device)
    if y.numel():
        values, scales = row_views(weight)
        padded = weight.row_format.padded_columns(weight.columns)
        dequantize_kernel[(triton.cdiv(weight.num_rows, UNPACKED_ROWS), triton.cdiv(padded, UNPACKED_COLUMNS))](
            values,
            scales,
            y,
            weight.num_rows,
            values.stride(0),
            scales.stride(0),
            COLUMNS=weight.columns,
            KIND=weight.row_format.kind,
            GROUP=weight.row_format.group,
            BLOCK_ROWS=UNPACKED_ROWS,
            CHUNK=UNPACKED_COLUMNS,
        )
    return y


def default_tiling(weight: PackedMatrix) -> Tiling:
    """Not tuned on any GPU yet: enough programs for a small one, chunks of whole cache lines."""
    return Tiling(block_rows=16 if weight.num_rows < 8192 else 32, chunk=256 if weight.row_format.kind == "q4" else 64)


def row_views(weight: PackedMatrix) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows as their values' type, and as float16 from the first scale on. Rows of bundles may lie apart."""
    dtypes = {"q4": torch.int32, "q8": torch.int8, "bf16": torch.int16, "f32": torch.float32}
    values = weight.rows.view(dtypes[weight.row_format.kind])
    if not weight.row_format.is_quantized:
        return values, values
    return values, weight.rows.view(torch.float16)[:, weight.row_format.value_bytes(weight.columns) // 2 :]
