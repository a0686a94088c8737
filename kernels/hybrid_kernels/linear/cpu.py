"""The reference's product, compiled: packed rows meet float32 vectors in registers, or are unpacked for a batch.

Bound by the bytes of the packed weights for a few tokens, by the multiplication in torch for many. Rows are shared out
among threads in blocks; each output is one thread's, so results do not depend on how many there are.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from hybrid_kernels.compiled import compiled
from hybrid_kernels.linear import reference
from hybrid_kernels.linear.op import SMALLEST_COMPILED
from hybrid_kernels.packed_matrix import PackedMatrix
from hybrid_kernels.row_simd import format_code, num_groups, row_dot, row_unpack, vector_columns

MOST_DOTS = 32  # tokens: above, unpacking a block once and multiplying it in torch is faster
ROWS_PER_TASK = 64
BLOCK_WEIGHTS = 1 << 22  # 16 MiB of float32: torch multiplies smaller blocks slowly


def linear(x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x: [T, K] float32; weight: [N, K]; bias: [N] float32 -> [T, N] float32."""
    if weight.row_format.kind == "f32" or weight.num_rows * weight.columns < SMALLEST_COMPILED:
        return reference.linear(x, weight, bias)
    output = torch.empty(len(x), weight.num_rows)
    if len(x) <= MOST_DOTS:
        _dots(x, weight, output)
    else:
        _blocks(x, weight, output)
    return output if bias is None else output.add_(bias)


def unpack_rows(weight: PackedMatrix, output: torch.Tensor) -> None:
    """Write the weights of N rows to output: float32 [N, vector_columns], contiguous."""
    row_format = weight.row_format
    _unpack_kernel(
        format_code(row_format),
        weight.rows.data_ptr(),
        weight.rows.stride(0),
        row_format.value_bytes(weight.columns),
        num_groups(row_format, weight.columns),
        output.numpy(),
    )


def padded_vectors(x: torch.Tensor, weight: PackedMatrix) -> torch.Tensor:
    """x: [T, K] -> contiguous float32 [T, vector_columns], zeros appended."""
    padding = vector_columns(weight.row_format, weight.columns) - weight.columns
    return torch.nn.functional.pad(x, (0, padding)).contiguous()


def _dots(x: torch.Tensor, weight: PackedMatrix, output: torch.Tensor) -> None:
    row_format = weight.row_format
    _dot_kernel(
        format_code(row_format),
        weight.rows.data_ptr(),
        weight.rows.stride(0),
        row_format.value_bytes(weight.columns),
        num_groups(row_format, weight.columns),
        padded_vectors(x, weight).numpy(),
        output.numpy(),
    )


def _blocks(x: torch.Tensor, weight: PackedMatrix, output: torch.Tensor) -> None:
    width = vector_columns(weight.row_format, weight.columns)
    step = max(1, BLOCK_WEIGHTS // width)
    scratch = torch.empty(min(step, weight.num_rows), width)
    for start in range(0, weight.num_rows, step):
        stop = min(start + step, weight.num_rows)
        block = scratch[: stop - start]
        unpack_rows(weight.slice_rows(start, stop), block)
        torch.mm(x, block[:, : weight.columns].T, out=output[:, start:stop])


@compiled(parallel=True)
def _dot_kernel(
    code: int, rows: int, stride: int, value_bytes: int, groups: int, x: np.ndarray, output: np.ndarray
) -> None:
    """x: [T, vector_columns]; output: [T, N]; rows: address of N rows, stride bytes apart."""
    num_rows = output.shape[1]
    for task in numba.prange((num_rows + ROWS_PER_TASK - 1) // ROWS_PER_TASK):
        for row_idx in range(task * ROWS_PER_TASK, min((task + 1) * ROWS_PER_TASK, num_rows)):
            row = rows + row_idx * stride
            for token in range(x.shape[0]):
                output[token, row_idx] = row_dot(code, row, row + value_bytes, x[token].ctypes.data, groups)


@compiled(parallel=True)
def _unpack_kernel(code: int, rows: int, stride: int, value_bytes: int, groups: int, output: np.ndarray) -> None:
    """output: [N, vector_columns]; rows: address of N rows, stride bytes apart."""
    num_rows = output.shape[0]
    for task in numba.prange((num_rows + ROWS_PER_TASK - 1) // ROWS_PER_TASK):
        for row_idx in range(task * ROWS_PER_TASK, min((task + 1) * ROWS_PER_TASK, num_rows)):
            row = rows + row_idx * stride
            row_unpack(code, row, row + value_bytes, output[row_idx].ctypes.data, groups)
