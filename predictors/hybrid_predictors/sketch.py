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

SMALLEST_SHARE = 1e-6  # of the largest variance: directions below are as good as unseen


@dataclass(frozen=True, slots=True)
class GatePredictor:
    """rows: [I, H], the gate's or what stands for them; bias: float32 [I] where the family has one."""

    rows: PackedMatrix
    bias: torch.Tensor | None = None
    threshold: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that it reads for one token."""
        return self.rows.num_rows * self.rows.rows.shape[1] + (0 if self.bias is None else 4 * len(self.bias))

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
    values, vectors = torch.linalg.eigh((inputs.T @ inputs / max(1, len(inputs))).double())
    scales = values.clamp(min=float(values.max()) * SMALLEST_SHARE).sqrt()
    left, strengths, right = torch.linalg.svd(weights.double() @ (vectors * scales), full_matrices=False)
    fc1 = (right[:rank] / scales) @ vectors.T  # [rank, H]
    fc2 = left[:, :rank] * strengths[:rank]  # [I, rank]
    # the two may be scaled against each other: rows of fc1 that give values of the same size suit a shared rounding
    sizes = (fc1 @ vectors * scales).norm(dim=1)
    return MlpPredictor(
        _packed(fc1 / sizes.unsqueeze(1), row_format),
        _packed(fc2 * sizes, row_format),
        bias=exact.bias,
        has_relu=False,
    )


def _dense(matrix: PackedMatrix) -> torch.Tensor:
    return dequantize_rows(matrix.rows, matrix.columns, matrix.row_format)


def _packed(weights: torch.Tensor, row_format: RowFormat) -> PackedMatrix:
    return PackedMatrix(quantize_rows(weights.float(), row_format), weights.shape[1], row_format)
