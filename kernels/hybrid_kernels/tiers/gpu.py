"""The GPU's part of a layer's feed-forward networks, for tokens that are decoded: what split and run_neurons do there.

    expert_linear   a predictor's two matrices, each token's of the experts that it goes to
    split           each pair's active neurons: those that are here, and the rest, which the CPU computes
    hot_values      gate and up rows of those that are here
    add_down_rows   their down rows; or those of the cold ones, whose values the CPU sends (merge point `hidden`)
    merge           sums of pairs, what the CPU computed and the residual stream

Nothing waits for the host: lists, their lengths and the experts stay on the device, grids cover the longest list there
can be. Sums have one order: the same input gives the same bits. reference.py has `split` in plain Python.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from hybrid_kernels.activation import Activation
from hybrid_kernels.linear.gpu import row_views
from hybrid_kernels.packed_matrix import PackedMatrix
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.tiers.gpu_kernels import (
    down_rows_kernel,
    expert_linear_kernel,
    merge_tiers_kernel,
    split_kernel,
    values_kernel,
)

LANES = 16  # of a tensor core's instruction
BLOCK_ROWS = 32
BLOCK_NEURONS = 32
BLOCK_COLUMNS = 256
NUM_SPLITS = 8
CHUNK = {"q4": 512, "q8": 128, "bf16": 64, "f32": 64}  # columns: q4 in 256 spills registers on sm_80 and 120
SPLIT_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class ExpertMatrices:
    """One matrix of each of a layer's networks. rows: uint8 [E, N, row_bytes], of which the first two dimensions may be
    strided; bias: float32 [E, N].
    """

    rows: torch.Tensor
    columns: int
    row_format: RowFormat
    bias: torch.Tensor | None = None

    def of(self, expert_idx: int) -> PackedMatrix:
        """One network's, without a copy."""
        return PackedMatrix(self.rows[expert_idx], self.columns, self.row_format)


@dataclass(frozen=True, slots=True)
class HotNetworks:
    """A layer's neurons that the GPU has. data: uint8 [n, parts, row_bytes]; rows: int32 [E, I], which of them a neuron
    is, -1: none. most: that one network has. down: uint8 [m, row_bytes], further down rows, of which down_of, int32
    [E, I], tells whose; gate_bias, up_bias: float32 [E, I]; down_bias: float32 [E, H].
    """

    data: torch.Tensor
    rows: torch.Tensor
    most: int
    hidden_size: int
    row_format: RowFormat
    down: torch.Tensor | None = None
    down_of: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @property
    def num_neurons(self) -> int:
        """Of one network (I), wherever they are."""
        return self.rows.shape[1]

    @property
    def has_gate(self) -> bool:
        """Whether the networks are gated linear units."""
        return self.data.shape[1] == 3


@dataclass(frozen=True, slots=True)
class Lists:
    """Of every pair: hot, cold: int32 [P, I], neurons; hot_counts: int32 [P]; cold_counts: int64 [P]."""

    hot: torch.Tensor
    hot_counts: torch.Tensor
    cold: torch.Tensor
    cold_counts: torch.Tensor


def expert_linear(
    x: torch.Tensor, matrices: ExpertMatrices, experts: torch.Tensor, *, has_relu: bool = False
) -> torch.Tensor:
    """x: float32 [T, K] or [P, K]; experts: int32 [P], P a multiple of T -> float32 [P, N]."""
    num_rows, num_pairs, apart = matrices.rows.shape[1], len(experts), matrices.rows.stride(0)
    values, scales = row_views(matrices.of(0))
    y = torch.empty(num_pairs, num_rows, device=x.device)
    expert_linear_kernel[(triton.cdiv(num_rows, BLOCK_ROWS), num_pairs)](
        x,
        values,
        scales,
        x if matrices.bias is None else matrices.bias,
        experts,
        y,
        num_rows,
        apart // values.element_size(),
        apart // scales.element_size(),
        values.stride(0),
        scales.stride(0),
        COLUMNS=matrices.columns,
        KIND=matrices.row_format.kind,
        GROUP=matrices.row_format.group,
        SHARED=num_pairs // len(x),
        HAS_BIAS=matrices.bias is not None,
        HAS_RELU=has_relu,
        BLOCK_ROWS=BLOCK_ROWS,
        LANES=LANES,
        CHUNK=CHUNK[matrices.row_format.kind],
    )
    return y


def split(
    networks: HotNetworks,
    experts: torch.Tensor,
    logits: torch.Tensor | None,
    threshold: float,
    cold: torch.Tensor,
    cold_counts: torch.Tensor,
    num_hot: torch.Tensor | None = None,
) -> Lists:
    """experts: int32 [P]; logits: float32 [P, I], active above the threshold; None: all are. cold, cold_counts: as in
    Lists, written to. num_hot: int64 [1], to which the number of hot ones is added.
    """
    num_pairs, num_neurons = len(experts), networks.num_neurons
    hot = torch.empty(num_pairs, num_neurons, dtype=torch.int32, device=experts.device)
    hot_counts = torch.empty(num_pairs, dtype=torch.int32, device=experts.device)
    split_kernel[(num_pairs,)](
        networks.rows if logits is None else logits,
        networks.rows,
        experts,
        hot,
        hot_counts,
        cold,
        cold_counts,
        cold_counts if num_hot is None else num_hot,
        num_neurons,
        threshold,
        HAS_LOGITS=logits is not None,
        ADDS_UP=num_hot is not None,
        BLOCK=SPLIT_BLOCK,
    )
    return Lists(hot, hot_counts, cold, cold_counts)


def hot_values(
    x: torch.Tensor, networks: HotNetworks, activation: Activation, experts: torch.Tensor, lists: Lists
) -> torch.Tensor:
    """x: float32 [T, H] -> float32 [P, I], of which the hot neurons' values are written, by their numbers."""
    num_pairs, row_format, hidden_size = len(experts), networks.row_format, networks.hidden_size
    hidden = torch.empty(num_pairs, networks.num_neurons, device=x.device)
    if networks.most == 0:
        return hidden
    first = PackedMatrix(networks.data[:, 0], hidden_size, row_format)
    values, scales = row_views(first)
    bias = x if networks.up_bias is None else networks.up_bias
    values_kernel[(triton.cdiv(networks.most, BLOCK_NEURONS), num_pairs)](
        x,
        values,
        scales,
        bias if networks.gate_bias is None else networks.gate_bias,
        bias,
        networks.rows,
        experts,
        lists.hot,
        lists.hot_counts,
        hidden,
        networks.num_neurons,
        values.stride(0),
        scales.stride(0),
        row_format.row_bytes(hidden_size) // values.element_size(),
        row_format.row_bytes(hidden_size) // 2,
        activation.threshold,
        COLUMNS=hidden_size,
        KIND=row_format.kind,
        GROUP=row_format.group,
        ACTIVATION=activation.kind,
        SHARED=num_pairs // len(x),
        HAS_GATE=networks.has_gate,
        HAS_BIAS=networks.up_bias is not None,
        BLOCK=BLOCK_NEURONS,
        LANES=LANES,
        CHUNK=CHUNK[row_format.kind],
    )
    return hidden


def new_partial(networks: HotNetworks, num_pairs: int, *, merges_hidden: bool) -> torch.Tensor:
    """float32 [P, splits, H], for the hot neurons' sums and, where cold ones' values come too, for theirs; zeros."""
    splits = NUM_SPLITS * (2 if merges_hidden else 1)
    return torch.zeros(num_pairs, splits, networks.hidden_size, device=networks.rows.device)


def add_down_rows(
    hidden: torch.Tensor, networks: HotNetworks, experts: torch.Tensor, lists: Lists, partial: torch.Tensor
) -> None:
    """hidden: float32 [P, I], by neurons' numbers. Writes the hot neurons' sums to partial."""
    if networks.most:
        rows = PackedMatrix(networks.data[:, -1], networks.hidden_size, networks.row_format)
        _down(hidden, rows, networks.rows, experts, lists.hot, lists.hot_counts, partial, 0)


def add_cold_down_rows(
    hidden: torch.Tensor, networks: HotNetworks, experts: torch.Tensor, lists: Lists, partial: torch.Tensor
) -> None:
    """The same of the cold neurons, whose values the CPU has computed."""
    assert networks.down is not None
    assert networks.down_of is not None
    if len(networks.down):
        rows = PackedMatrix(networks.down, networks.hidden_size, networks.row_format)
        _down(hidden, rows, networks.down_of, experts, lists.cold, lists.cold_counts, partial, NUM_SPLITS)


def _down(
    hidden: torch.Tensor,
    matrix: PackedMatrix,
    rows: torch.Tensor,
    experts: torch.Tensor,
    listed: torch.Tensor,
    counts: torch.Tensor,
    partial: torch.Tensor,
    first_split: int,
) -> None:
    row_format = matrix.row_format
    values, scales = row_views(matrix)
    column_blocks = triton.cdiv(row_format.padded_columns(matrix.columns), BLOCK_COLUMNS)
    down_rows_kernel[(column_blocks, NUM_SPLITS, len(experts))](
        hidden,
        values,
        scales,
        rows,
        experts,
        listed,
        counts,
        partial,
        rows.shape[1],
        values.stride(0),
        scales.stride(0),
        first_split,
        partial.shape[1],
        COLUMNS=matrix.columns,
        KIND=row_format.kind,
        GROUP=row_format.group,
        BLOCK=BLOCK_NEURONS,
        LANES=LANES,
        CHUNK=BLOCK_COLUMNS,
    )


def merge(
    partial: torch.Tensor,
    networks: HotNetworks,
    experts: torch.Tensor,
    expert_weights: torch.Tensor,
    *,
    cold: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    num_tokens: int = 1,
) -> torch.Tensor:
    """expert_weights: float32 [P]; cold, residual: float32 [T, H], added -> float32 [T, H]."""
    hidden_size = networks.hidden_size
    y = torch.empty(num_tokens, hidden_size, device=partial.device)
    merge_tiers_kernel[(triton.cdiv(hidden_size, BLOCK_COLUMNS), num_tokens)](
        partial,
        expert_weights,
        experts,
        y if networks.down_bias is None else networks.down_bias,
        y if cold is None else cold,
        y if residual is None else residual,
        y,
        partial.shape[1],
        COLUMNS=hidden_size,
        SLOTS=len(experts) // num_tokens,
        HAS_BIAS=networks.down_bias is not None,
        HAS_COLD=cold is not None,
        HAS_RESIDUAL=residual is not None,
        CHUNK=BLOCK_COLUMNS,
    )
    return y
