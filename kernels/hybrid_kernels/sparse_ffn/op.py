"""One feed-forward network over an active set of neurons: argument checks and dispatch."""

from __future__ import annotations

import torch

from hybrid_kernels.activation import Activation
from hybrid_kernels.linear.op import SMALLEST_COMPILED
from hybrid_kernels.packed_matrix import Bundles
from hybrid_kernels.sparse_ffn import reference


def sparse_ffn(
    x: torch.Tensor,
    bundles: Bundles,
    activation: Activation,
    active: torch.Tensor | None = None,
    *,
    gate_first: bool = False,
) -> torch.Tensor:
    """x: [T, H] float32; active: [T, I] bool, or None for every neuron -> [T, H] float32.

    gate_first computes every gate and stops there where it is not positive; it needs an activation whose gate decides.
    Raises ValueError when shapes, gate and activation do not fit each other.
    """
    if x.dim() != 2 or x.shape[1] != bundles.hidden_size or x.dtype != torch.float32:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, expected float32 [T, {bundles.hidden_size}]")
    if activation.is_gated != bundles.has_gate:
        raise ValueError(f"{activation.kind} on bundles {'with' if bundles.has_gate else 'without'} a gate row")
    expected = (len(x), bundles.num_neurons)
    if active is not None and (tuple(active.shape) != expected or active.dtype != torch.bool):
        raise ValueError(f"active is {active.dtype} {tuple(active.shape)}, expected bool {expected}")
    if gate_first and not activation.gate_decides:
        raise ValueError(f"gate_first needs an activation whose gate decides, found {activation.kind}")
    if bundles.num_neurons * bundles.hidden_size < SMALLEST_COMPILED:
        return reference.sparse_ffn(x, bundles, activation, active)
    from hybrid_kernels.sparse_ffn import cpu  # noqa: PLC0415  # Numba loads only where it is used

    return cpu.sparse_ffn(x, bundles, activation, active, gate_first=gate_first)
