"""Predictors without training: the gate itself, and two sketches of it.

exact_gate   the gate rows as they are; what follows is spared where the gate does not fire. Never wrong, and a third of
             the network's bytes
sign         the gate rows at 4 bits: the sign of a dot product outlives coarse weights (SparseInfer, arXiv 2411.12692,
             keeps one bit a weight and counts bits; 4 bits are what our kernels read)
svd          the gate matrix at low rank, an MlpPredictor without nonlinearity. The error counts as the inputs weigh it:
             the low rank of W C^(1/2), C being the inputs' second moment (as in ASVD, arXiv 2312.05821)

Where an activation also cuts off the other factor (dReLU), they predict more neurons than fire.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybrid_kernels.linear.op import linear
from hybrid_kernels.packed_matrix import Bundles, PackedMatrix
from hybrid_kernels.quantization.op import dequantize_rows, quantize_rows
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.team import Team
from hybrid_predictors.mlp import MlpPredictor

SMALLEST_SHARE = 1e-6  # of the mean variance, added to all: directions below are as good as unseen
MOST_INPUTS = 1 << 14  # tokens that the inputs' second moment is taken from
OVERSAMPLING = 16
POWER_ITERATIONS = 3


@dataclass(frozen=True, slots=True)
class GatePredictor:
    """rows: [I, H], the gate's or what stands for them; bias: float32 [I] where the family has one."""

    rows: PackedMatrix
    bias: torch.Tensor | None = None
    threshold: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that it reads for one token."""
        return self.rows.num_bytes + (0 if self.bias is None else 4 * len(self.bias))

    def logits(self, predictor_input: torch.Tensor, team: Team) -> torch.Tensor:
        """predictor_input: [T, H] float32, what the gate itself reads -> [T, I] float32."""
        return linear(predictor_input, self.rows, self.bias, team=team)

    def active(self, predictor_input: torch.Tensor, team: Team) -> torch.Tensor:
        """predictor_input: [T, H] float32 -> bool [T, I]: the active set of each token."""
        return self.logits(predictor_input, team) > self.threshold


def exact_gate(bundles: Bundles, threshold: float = 0.0) -> GatePredictor:
    """threshold: fatrelu's T. Without a gate, the up rows decide."""
    if bundles.has_gate:
        return GatePredictor(bundles.gate_proj, bundles.gate_bias, threshold)
    return GatePredictor(bundles.up_proj, bundles.up_bias, threshold)


def sign_sketch(bundles: Bundles, row_format: RowFormat) -> GatePredictor:
    """The deciding rows in a coarse format, such as q4."""
    exact = exact_gate(bundles)
    rows = PackedMatrix(quantize_rows(_dense(exact.rows), row_format), exact.rows.columns, row_format)
    return GatePredictor(rows, exact.bias)


def svd_sketch(bundles: Bundles, inputs: torch.Tensor, rank: int, row_format: RowFormat) -> MlpPredictor:
    """inputs: float32 [n, H], a sample of what the gate reads. Raise ValueError for a rank that the matrix has not."""
    exact = exact_gate(bundles)
    weights = _dense(exact.rows)  # [I, H]
    if not 1 <= rank <= min(weights.shape):
        raise ValueError(f"rank {rank}: a matrix of {tuple(weights.shape)} has ranks from 1 to {min(weights.shape)}")
    some = inputs[:MOST_INPUTS]
    moment = (some.T @ some / max(1, len(some))).double()
    moment.diagonal().add_(SMALLEST_SHARE * float(moment.diagonal().mean()))
    factor = torch.linalg.cholesky(moment)  # [H, H], so that factor @ factor.T is the moment
    left, strengths, right = _largest_parts(weights @ factor.float(), rank)
    fc1 = torch.linalg.solve_triangular(factor.T, right.T.double(), upper=True).T  # [rank, H]: values of size 1
    return MlpPredictor(
        _packed(fc1, row_format), _packed(left * strengths, row_format), bias=exact.bias, has_relu=False
    )


def _largest_parts(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """matrix: float32 [m, n] -> [m, rank], [rank], [rank, n]: its largest singular values' parts.

    By a random range and a few rounds of power iteration (Halko, Martinsson and Tropp, arXiv 0909.4061), the same ones
    each time: the whole decomposition of an expert of Mixtral takes minutes.
    """
    width = min(rank + OVERSAMPLING, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    basis = matrix @ torch.randn(matrix.shape[1], width, generator=generator)
    for _ in range(POWER_ITERATIONS):
        basis = matrix @ (matrix.T @ torch.linalg.qr(basis).Q)
    basis = torch.linalg.qr(basis).Q
    left, strengths, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ left)[:, :rank], strengths[:rank], right[:rank]


def _dense(matrix: PackedMatrix) -> torch.Tensor:
    return dequantize_rows(matrix.rows, matrix.columns, matrix.row_format)


def _packed(weights: torch.Tensor, row_format: RowFormat) -> PackedMatrix:
    return PackedMatrix(quantize_rows(weights.float(), row_format), weights.shape[1], row_format)
