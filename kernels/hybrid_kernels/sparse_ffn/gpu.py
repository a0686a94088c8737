"""One feed-forward network over an active list of neurons on a GPU, for a few tokens: three kernels and no host sync.

The list and its length stay on the device: grids cover the longest list there can be, and programs beyond its length
leave at once, so that a CUDA graph can hold all of it. Partial sums of the down projection are added up in a fixed
order, not by atomics: the same list gives the same bits. Two tokens or more share the union of their lists; a neuron
that is not a token's own is zeroed for it.
"""

from __future__ import annotations

import torch
import triton

from hybrid_kernels.activation import Activation
from hybrid_kernels.linear.gpu import LEAST_VECTORS, row_views
from hybrid_kernels.packed_matrix import Bundles
from hybrid_kernels.sparse_ffn.gpu_kernels import down_kernel, gate_and_up_kernel, merge_kernel, select_kernel

MOST_TOKENS = 16
BLOCK_NEURONS = 32
BLOCK_COLUMNS = 256
NUM_SPLITS = 8
CHUNK = {"q4": 256, "q8": 64, "bf16": 64, "f32": 64}
SELECT_BLOCK = 1024


def sparse_ffn(
    x: torch.Tensor,
    bundles: Bundles,
    activation: Activation,
    selected: torch.Tensor,
    *,
    cold: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """x: [T, H] float32; selected: [T, I] bool; cold, residual: [T, H] float32, added -> [T, H] float32.

    Everything on one GPU. Raises ValueError for more than MOST_TOKENS, and for an activation that leaves no zeros.
    """
    num_tokens, hidden_size = x.shape
    if num_tokens > MOST_TOKENS:
        raise ValueError(f"x has {num_tokens} tokens, expected at most {MOST_TOKENS}: the union of lists is dense")
    if not activation.is_sparse:
        raise ValueError(f"{activation.kind} leaves no zeros behind: multiply densely")
    num_neurons, row_format = bundles.num_neurons, bundles.row_format
    chosen = selected.to(torch.int8).contiguous()
    neurons = torch.empty(num_neurons, dtype=torch.int32, device=x.device)
    num_selected = torch.empty(1, dtype=torch.int32, device=x.device)
    select_kernel[(1,)](chosen, neurons, num_selected, num_neurons, num_tokens, BLOCK=SELECT_BLOCK, TOKENS=MOST_TOKENS)
    hidden = torch.empty(num_neurons, LEAST_VECTORS, device=x.device)
    first, down = bundles.gate_proj if bundles.has_gate else bundles.up_proj, bundles.down_proj_t
    values, scales = row_views(first)
    parts = {"COLUMNS": hidden_size, "KIND": row_format.kind, "GROUP": row_format.group, "BLOCK": BLOCK_NEURONS}
    bias = x if bundles.up_bias is None else bundles.up_bias
    gate_and_up_kernel[(triton.cdiv(num_neurons, BLOCK_NEURONS),)](
        x,
        values,
        scales,
        bias if bundles.gate_bias is None else bundles.gate_bias,
        bias,
        chosen,
        neurons,
        num_selected,
        hidden,
        num_neurons,
        num_tokens,
        values.stride(0),
        scales.stride(0),
        row_format.row_bytes(hidden_size) // values.element_size(),
        row_format.row_bytes(hidden_size) // 2,
        activation.threshold,
        **parts,
        ACTIVATION=activation.kind,
        HAS_GATE=bundles.has_gate,
        HAS_BIAS=bundles.up_bias is not None,
        TOKENS=LEAST_VECTORS,
        CHUNK=CHUNK[row_format.kind],
    )
    values, scales = row_views(down)
    partial = torch.empty(NUM_SPLITS, LEAST_VECTORS, hidden_size, device=x.device)
    column_blocks = triton.cdiv(row_format.padded_columns(hidden_size), BLOCK_COLUMNS)
    down_kernel[(column_blocks, NUM_SPLITS)](
        hidden,
        values,
        scales,
        neurons,
        num_selected,
        partial,
        values.stride(0),
        scales.stride(0),
        **parts,
        TOKENS=LEAST_VECTORS,
        CHUNK=BLOCK_COLUMNS,
    )
    y = torch.empty_like(x)
    merge_kernel[(triton.cdiv(hidden_size, BLOCK_COLUMNS), num_tokens)](
        partial,
        y if bundles.down_bias is None else bundles.down_bias,
        y if cold is None else cold,
        y if residual is None else residual,
        y,
        COLUMNS=hidden_size,
        TOKENS=LEAST_VECTORS,
        SPLITS=NUM_SPLITS,
        HAS_BIAS=bundles.down_bias is not None,
        HAS_COLD=cold is not None,
        HAS_RESIDUAL=residual is not None,
        CHUNK=BLOCK_COLUMNS,
    )
    return y
