"""A packed matrix times a batch of vectors, in float32: dequantise, multiply."""

from __future__ import annotations

import torch

from hybrid_kernels.packed_matrix import PackedMatrix
from hybrid_kernels.quantization.reference import dequantize_rows


def linear(x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x: [T, K] float32; weight: [N, K]; bias: [N] float32 -> [T, N] float32."""
    dense = dequantize_rows(weight.rows, weight.columns, weight.row_format)  # [N, K]
    return torch.nn.functional.linear(x, dense, bias)
