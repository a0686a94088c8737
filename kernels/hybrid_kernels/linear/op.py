"""A packed matrix times a batch of vectors: argument checks and dispatch."""

from __future__ import annotations

import torch

from hybrid_kernels.linear import batch, reference
from hybrid_kernels.packed_matrix import PackedMatrix
from hybrid_kernels.team import Team


def linear(x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None = None, *, team: Team) -> torch.Tensor:
    """x: [T, K] float32; weight: [N, K]; bias: [N] float32 -> [T, N] float32. Raises ValueError on other shapes.

    q8 and q4 rows meet x rounded to int8 (reference.rounded_linear); f32 and bf16 rows meet it as it is.
    """
    if x.dim() != 2 or x.shape[1] != weight.columns or x.dtype != torch.float32:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, expected float32 [T, {weight.columns}]")
    if bias is not None and tuple(bias.shape) != (weight.num_rows,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({weight.num_rows},)")
    if weight.row_format.kind == "f32":
        return reference.linear(x, weight, bias)  # f32 rows are dense matrices as they are
    if weight.row_format.kind == "bf16":
        output = batch.multiply_unpacked(x, weight, team)
    else:
        output = batch.multiply(batch.quantize_batch(x, weight.row_format, team), weight, team)
    return output if bias is None else output.add_(bias)
