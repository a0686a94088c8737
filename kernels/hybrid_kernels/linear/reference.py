"""A packed matrix times a batch of vectors, in float32: dequantise, multiply; and how kernels round the vectors."""

from __future__ import annotations

import torch

from hybrid_kernels.packed_matrix import PackedMatrix
from hybrid_kernels.quantization.reference import dequantize_rows
from hybrid_kernels.quantization.row_format import RowFormat


def linear(x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x: [T, K] float32; weight: [N, K]; bias: [N] float32 -> [T, N] float32."""
    dense = dequantize_rows(weight.rows, weight.columns, weight.row_format)  # [N, K]
    return torch.nn.functional.linear(x, dense, bias)


def rounded_linear(x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same with x rounded as kernels round it for rows of q8 and q4; f32 and bf16 rows meet x as it is."""
    return linear(round_vectors(x, weight.row_format), weight, bias)


def round_vectors(x: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    """x: [T, K] float32, finite -> the nearest whole steps, of a 127th of the largest in each group of columns."""
    if not row_format.is_quantized:
        return x
    num_tokens, columns = x.shape
    padded = torch.nn.functional.pad(x, (0, row_format.padded_columns(columns) - columns))
    groups = padded.view(num_tokens, padded.shape[1] // row_format.group, row_format.group)
    largest = groups.abs().amax(dim=2, keepdim=True)
    inverse = torch.tensor(127.0) / largest  # of a number, torch would take the reciprocal first and round twice
    levels = (groups * torch.where(largest == 0, 0, inverse)).round()
    return (levels * (largest / 127)).view(padded.shape)[:, :columns]
