"""One feed-forward network over an active set of neurons, for a batch of tokens: argument checks and dispatch.

One token at a time goes through `run_neurons` (cpu.py) instead, as a part of a whole token's program.
"""

from __future__ import annotations

import torch

from hybrid_kernels.activation import Activation
from hybrid_kernels.packed_matrix import Bundles
from hybrid_kernels.sparse_ffn import batch
from hybrid_kernels.sparse_ffn.reference import Observe
from hybrid_kernels.team import Team


def sparse_ffn(
    x: torch.Tensor,
    bundles: Bundles,
    activation: Activation,
    active: torch.Tensor | None = None,
    *,
    team: Team,
    observe: Observe | None = None,
) -> torch.Tensor:
    """x: [T, H] float32; active: [T, I] bool, or None for every neuron -> [T, H] float32.

    observe: is called with the values of neurons, block by block, every computed neuron once; at least one call.
    Raises ValueError when shapes, gate and activation do not fit each other.
    """
    if x.dim() != 2 or x.shape[1] != bundles.hidden_size or x.dtype != torch.float32:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, expected float32 [T, {bundles.hidden_size}]")
    if activation.is_gated != bundles.has_gate:
        raise ValueError(f"{activation.kind} on bundles {'with' if bundles.has_gate else 'without'} a gate row")
    expected = (len(x), bundles.num_neurons)
    if active is not None and (tuple(active.shape) != expected or active.dtype != torch.bool):
        raise ValueError(f"active is {active.dtype} {tuple(active.shape)}, expected bool {expected}")
    return batch.sparse_ffn(x, bundles, activation, active, team, observe)
