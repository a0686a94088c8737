"""Quantising and dequantising rows: argument checks, and the choice between the reference and its faster twin."""

from __future__ import annotations

import math

import torch

from hybrid_kernels.quantization import reference
from hybrid_kernels.quantization.row_format import RowFormat

__all__ = ["dequantize_rows", "quantize_rows"]

SMALLEST_COMPILED = 1 << 18  # weights: below, starting Numba costs more than torch takes
LARGEST_BFLOAT16 = torch.finfo(torch.bfloat16).max


def quantize_rows(weights: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    """weights: [N, K] float32, float16 or bfloat16 -> uint8 [N, row_bytes]; q4 is fitted by least squares.

    Raises TypeError for other dtypes, ValueError for another rank, for NaN or Inf, and for scales beyond float16.
    """
    if weights.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"weights are {weights.dtype}, expected float32, float16 or bfloat16")
    if weights.dim() != 2:
        raise ValueError(f"weights have shape {tuple(weights.shape)}, expected two dimensions")
    _check_range(weights, row_format)
    if row_format.is_quantized and weights.numel() >= SMALLEST_COMPILED:
        from hybrid_kernels.quantization import cpu  # noqa: PLC0415  # Numba loads only where it is used

        return cpu.quantize_rows(weights, row_format)
    return reference.quantize_rows(weights, row_format)


def dequantize_rows(rows: torch.Tensor, columns: int, row_format: RowFormat) -> torch.Tensor:
    """rows: uint8 [N, row_bytes] -> float32 [N, columns]. Raises ValueError when the bytes do not fit the format."""
    if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != row_format.row_bytes(columns):
        raise ValueError(
            f"rows are {rows.dtype} {tuple(rows.shape)}, expected uint8 [N, {row_format.row_bytes(columns)}] "
            f"for {columns} columns of {row_format}"
        )
    return reference.dequantize_rows(rows, columns, row_format)


def _check_range(weights: torch.Tensor, row_format: RowFormat) -> None:
    if weights.numel() == 0:
        return
    lowest, highest = (extreme.item() for extreme in torch.aminmax(weights))  # one pass; NaN wins over every number
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise ValueError("weights contain NaN or Inf")
    largest = max(-lowest, highest)
    if row_format.kind == "bf16" and largest > LARGEST_BFLOAT16:
        raise ValueError(f"a weight is {largest:.4g}, above bfloat16's {LARGEST_BFLOAT16:.4g}: use f32 here")
