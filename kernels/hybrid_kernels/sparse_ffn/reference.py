"""One feed-forward network over all its neurons, those outside the active set multiplied by zero."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hybrid_kernels.activation import Activation, activate
from hybrid_kernels.linear.reference import linear, round_vectors, rounded_linear
from hybrid_kernels.packed_matrix import Bundles, PackedMatrix
from hybrid_kernels.quantization.reference import dequantize_rows
from hybrid_kernels.quantization.row_format import RowFormat

Observe = Callable[["slice | torch.Tensor", torch.Tensor], None]
"""Gets which neurons (a slice, or int64 [N]) and their values after the activation, [T, N]; must not keep them."""

BLOCK = RowFormat("q8", 32)  # neurons that share a scale in a down projection of a batch


def sparse_ffn(
    x: torch.Tensor,
    bundles: Bundles,
    activation: Activation,
    active: torch.Tensor | None = None,
    observe: Observe | None = None,
) -> torch.Tensor:
    """x: [T, H] float32; active: [T, I] bool, or None for every neuron -> [T, H] float32."""
    gate = linear(x, bundles.gate_proj, bundles.gate_bias) if bundles.has_gate else None  # [T, I]
    up = linear(x, bundles.up_proj, bundles.up_bias)  # [T, I]
    hidden = _masked(activate(activation, gate, up), active)
    if observe is not None:
        observe(slice(0, bundles.num_neurons), hidden)
    return _with_bias(hidden @ _dense(bundles.down_proj_t), bundles)


def rounded_sparse_ffn(
    x: torch.Tensor, bundles: Bundles, activation: Activation, active: torch.Tensor | None = None
) -> torch.Tensor:
    """The same with x rounded for gate and up as kernels round it; the down projection is not rounded."""
    return _with_bias(rounded_hidden(x, bundles, activation, active) @ _dense(bundles.down_proj_t), bundles)


def rounded_hidden(
    x: torch.Tensor, bundles: Bundles, activation: Activation, active: torch.Tensor | None = None
) -> torch.Tensor:
    """The neurons' values [T, I], from x rounded as kernels round it."""
    gate = rounded_linear(x, bundles.gate_proj, bundles.gate_bias) if bundles.has_gate else None  # [T, I]
    return _masked(activate(activation, gate, rounded_linear(x, bundles.up_proj, bundles.up_bias)), active)


def rounded_down(hidden: torch.Tensor, rows: PackedMatrix) -> torch.Tensor:
    """hidden: [T, N] float32; rows: [N, H] -> [T, H], as a batch's kernel rounds: bytes with a scale for 32 neurons.

    The rows are rounded so along each column, since their own scales run along the rows.
    """
    return round_vectors(hidden, BLOCK) @ round_vectors(_dense(rows).T.contiguous(), BLOCK).T


def _masked(hidden: torch.Tensor, active: torch.Tensor | None) -> torch.Tensor:
    return hidden if active is None else hidden * active


def _dense(matrix: PackedMatrix) -> torch.Tensor:
    return dequantize_rows(matrix.rows, matrix.columns, matrix.row_format)


def _with_bias(output: torch.Tensor, bundles: Bundles) -> torch.Tensor:
    return output if bundles.down_bias is None else output + bundles.down_bias
