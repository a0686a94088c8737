"""The sparse feed-forward network in blocks of neurons, reading no bundle that no token of the batch activates.

Bound by the bytes of the active bundles. With `gate_first` the gate rows of all neurons are read, and the up and down
rows only of those whose gate fires: exact for every activation whose gate decides.
"""

from __future__ import annotations

import torch

from hybrid_kernels.activation import Activation, gate_fires
from hybrid_kernels.linear.cpu import linear
from hybrid_kernels.packed_matrix import Bundles
from hybrid_kernels.sparse_ffn import reference

BLOCK_WEIGHTS = 1 << 20  # of each part: 4 MiB of float32
WORTHWHILE_SHARE = 0.7  # above this share of active neurons, gathering costs more than the rows it saves


def sparse_ffn(
    x: torch.Tensor,
    bundles: Bundles,
    activation: Activation,
    active: torch.Tensor | None = None,
    *,
    gate_first: bool = False,
) -> torch.Tensor:
    """x: [T, H] float32; active: [T, I] bool, or None for every neuron -> [T, H] float32."""
    if gate_first and activation.gate_decides:
        fires = gate_fires(activation, linear(x, bundles.gate_proj, bundles.gate_bias))  # [T, I]
        active = fires if active is None else active & fires
    if active is not None:
        union = active.any(dim=0).nonzero().squeeze(1)  # [N], sorted
        if len(union) < WORTHWHILE_SHARE * bundles.num_neurons:
            return _over_blocks(x, bundles, activation, active, union)
    return _over_blocks(x, bundles, activation, active, None)


def _over_blocks(
    x: torch.Tensor, bundles: Bundles, activation: Activation, active: torch.Tensor | None, union: torch.Tensor | None
) -> torch.Tensor:
    """Sum the contributions of the neurons in union (None: all), a block at a time in ascending order."""
    output = torch.zeros_like(x)
    num_neurons = bundles.num_neurons if union is None else len(union)
    block = max(1, BLOCK_WEIGHTS // bundles.hidden_size)
    for start in range(0, num_neurons, block):
        neurons = slice(start, start + block) if union is None else union[start : start + block]
        block_active = None if active is None else active[:, neurons]
        output += reference.sparse_ffn(x, bundles.take(neurons), activation, block_active)
    return output if bundles.down_bias is None else output + bundles.down_bias
