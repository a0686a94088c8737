"""A packed matrix times a batch of vectors: argument checks and dispatch."""

from __future__ import annotations

import torch

from hybrid_kernels.linear import reference
from hybrid_kernels.packed_matrix import PackedMatrix

SMALLEST_COMPILED = 1 << 18  # weights: below, torch is done before compiled code is loaded


def linear(x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x: [T, K] float32; weight: [N, K]; bias: [N] float32 -> [T, N] float32. Raises ValueError on other shapes."""
    if x.dim() != 2 or x.shape[1] != weight.columns or x.dtype != torch.float32:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, expected float32 [T, {weight.columns}]")
    if bias is not None and tuple(bias.shape) != (weight.num_rows,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({weight.num_rows},)")
    if weight.row_format.kind == "f32" or weight.num_rows * weight.columns < SMALLEST_COMPILED:
        return reference.linear(x, weight, bias)  # f32 rows are dense matrices as they are
    from hybrid_kernels.linear import cpu  # noqa: PLC0415  # Numba loads only where it is used

    return cpu.linear(x, weight, bias)
