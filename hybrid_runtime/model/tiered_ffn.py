"""One feed-forward network over a batch of tokens, its neurons spread over tiers: some of them at a time.

The bundles that the batch needs are brought together, from wherever they are, and computed as they always are. What
comes out does not depend on where they were: neurons come in their order, in blocks of the same sizes.
"""

from __future__ import annotations

import torch

from hybrid_kernels.activation import Activation
from hybrid_kernels.sparse_ffn.op import sparse_ffn
from hybrid_kernels.sparse_ffn.reference import Observe
from hybrid_kernels.team import Team
from hybrid_runtime.tiers.bundles import TieredBundles


def tiered_ffn(
    x: torch.Tensor,
    bundles: TieredBundles,
    activation: Activation,
    active: torch.Tensor | None,
    *,
    team: Team,
    observe: Observe | None = None,
) -> torch.Tensor:
    """x: [T, H] float32; active: [T, I] bool, or None for every neuron -> [T, H] float32.

    observe: is called with the values of neurons, block by block. Raises StoreError where the disk cannot be read.
    """
    neurons = torch.arange(bundles.num_neurons) if active is None else active.any(dim=0).nonzero().squeeze(1)
    output = torch.zeros_like(x)
    if observe is not None and len(neurons) == 0:
        observe(neurons, x.new_zeros(len(x), 0))  # that nothing was computed is to be seen, too
    for some, block in bundles.gathered(neurons):
        own = None if active is None else active[:, some]
        seen = None if observe is None else _renamed(observe, some)
        output += sparse_ffn(x, block, activation, own, team=team, observe=seen)
    return output if bundles.down_bias is None else output.add_(bundles.down_bias)


def _renamed(observe: Observe, neurons: torch.Tensor) -> Observe:
    """An observer that tells the neurons of a block by their numbers in the network. neurons: int64 [block]."""

    def see(of_block: slice | torch.Tensor, values: torch.Tensor) -> None:
        observe(neurons[of_block], values)

    return see
