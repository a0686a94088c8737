"""One feed-forward network over all its neurons, those outside the active set multiplied by zero."""

from __future__ import annotations

import torch

from hybrid_kernels.activation import Activation, activate
from hybrid_kernels.linear.reference import linear
from hybrid_kernels.packed_matrix import Bundles
from hybrid_kernels.quantization.reference import dequantize_rows


def sparse_ffn(
    x: torch.Tensor, bundles: Bundles, activation: Activation, active: torch.Tensor | None = None
) -> torch.Tensor:
    """x: [T, H] float32; active: [T, I] bool, or None for every neuron -> [T, H] float32."""
    gate = linear(x, bundles.gate_proj, bundles.gate_bias) if bundles.has_gate else None  # [T, I]
    up = linear(x, bundles.up_proj, bundles.up_bias)  # [T, I]
    hidden = activate(activation, gate, up)
    if active is not None:
        hidden = hidden * active
    down = bundles.down_proj_t
    output = hidden @ dequantize_rows(down.rows, down.columns, down.row_format)  # [T, H]
    return output if bundles.down_bias is None else output + bundles.down_bias
