"""The reference's product in blocks of rows that stay in the cache after they are dequantised.

Bound by the bytes of the packed weights and, today, by torch's dequantisation passes over them.
"""

from __future__ import annotations

import torch

from hybrid_kernels.linear import reference
from hybrid_kernels.packed_matrix import PackedMatrix

BLOCK_WEIGHTS = 1 << 20  # 4 MiB of float32


def linear(x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x: [T, K] float32; weight: [N, K]; bias: [N] float32 -> [T, N] float32."""
    if weight.row_format.kind == "f32":
        return reference.linear(x, weight, bias)  # a view: nothing to dequantise
    output = torch.empty(len(x), weight.num_rows)
    block = max(1, BLOCK_WEIGHTS // max(1, weight.columns))
    for start in range(0, weight.num_rows, block):
        stop = min(start + block, weight.num_rows)
        output[:, start:stop] = reference.linear(x, weight.slice_rows(start, stop))
    return output if bias is None else output.add_(bias)
