"""The feed-forward network for a batch of tokens: gate, up and down one after another, over the neurons that any needs.

Together, tokens activate most neurons: above WORTHWHILE_SHARE of them all are computed, below only the union is.
"""

from __future__ import annotations

import torch

from hybrid_kernels.activation import Activation, activate
from hybrid_kernels.linear import batch
from hybrid_kernels.linear.op import linear
from hybrid_kernels.packed_matrix import Bundles, PackedMatrix
from hybrid_kernels.sparse_ffn import reference
from hybrid_kernels.sparse_ffn.reference import Observe
from hybrid_kernels.team import Team

WORTHWHILE_SHARE = 0.9  # of neurons: above, leaving some out saves less than finding them costs
BLOCK_WEIGHTS = 1 << 22  # 16 MiB of float32 at once


def sparse_ffn(
    x: torch.Tensor,
    bundles: Bundles,
    activation: Activation,
    active: torch.Tensor | None,
    team: Team,
    observe: Observe | None = None,
) -> torch.Tensor:
    """x: [T, H] float32; active: [T, I] bool, or None for every neuron -> [T, H] float32."""
    if bundles.row_format.kind == "f32" and active is None:
        return reference.sparse_ffn(x, bundles, activation, observe=observe)  # three matrices as they are
    neurons = None  # int64 [N], ascending
    if active is not None:
        union = active.any(dim=0)
        if int(union.sum()) < WORTHWHILE_SHARE * bundles.num_neurons:
            neurons = union.nonzero().squeeze(1)
            active = active[:, neurons]
    if bundles.row_format.is_quantized:
        output = _quantized(x, bundles, activation, active, neurons, team, observe)
    else:
        output = _unpacked(x, bundles, activation, active, neurons, team, observe)
    return output if bundles.down_bias is None else output.add_(bundles.down_bias)


def _quantized(
    x: torch.Tensor,
    bundles: Bundles,
    activation: Activation,
    active: torch.Tensor | None,
    neurons: torch.Tensor | None,
    team: Team,
    observe: Observe | None,
) -> torch.Tensor:
    index = None if neurons is None else neurons.to(torch.int32).numpy()
    vectors = batch.quantize_batch(x, bundles.row_format, team)

    def project(rows: PackedMatrix, bias: torch.Tensor | None) -> torch.Tensor:
        output = batch.multiply(vectors, rows, team, index)
        if bias is not None:
            output += bias if neurons is None else bias[neurons]
        return output

    gate = project(bundles.gate_proj, bundles.gate_bias) if bundles.has_gate else None  # [T, N]
    hidden = activate(activation, gate, project(bundles.up_proj, bundles.up_bias))
    if active is not None:
        hidden *= active
    if observe is not None:
        observe(slice(0, bundles.num_neurons) if neurons is None else neurons, hidden)
    return batch.multiply_down(hidden, bundles.down_proj_t, team, index)


def _unpacked(
    x: torch.Tensor,
    bundles: Bundles,
    activation: Activation,
    active: torch.Tensor | None,
    neurons: torch.Tensor | None,
    team: Team,
    observe: Observe | None,
) -> torch.Tensor:
    """A block of neurons at a time, in ascending order."""
    output = torch.zeros_like(x)
    if observe is not None and neurons is not None and len(neurons) == 0:
        observe(neurons, x.new_zeros(len(x), 0))  # that nothing was computed is to be seen, too
    step = max(1, BLOCK_WEIGHTS // bundles.hidden_size)
    for start in range(0, bundles.num_neurons if neurons is None else len(neurons), step):
        where = slice(start, start + step)
        block = bundles.take(where if neurons is None else neurons[where])
        gate = linear(x, block.gate_proj, block.gate_bias, team=team) if block.has_gate else None
        hidden = activate(activation, gate, linear(x, block.up_proj, block.up_bias, team=team))
        if active is not None:
            hidden *= active[:, where]
        if observe is not None:
            observe(slice(start, start + block.num_neurons) if neurons is None else neurons[where], hidden)
        down = block.down_proj_t
        width = down.row_format.padded_columns(down.columns)
        weights = torch.empty(block.num_neurons, -(-width // 8) * 8)
        batch.unpack(down, weights, team)
        output += hidden @ weights[:, : down.columns]
    return output
