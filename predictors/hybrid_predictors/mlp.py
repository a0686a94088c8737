"""The low-rank predictor that TurboSparse checkpoints carry: which neurons of one FFN fire for a token.

    m = 1 where fc2(relu(fc1(p))) > threshold, else 0

The published forward multiplies by round(sigmoid(logit)), which is this with threshold 0 (half rounds to even, so to
0). PowerInfer's files may carry another threshold. What `p` is, the checkpoint's family says.

Deja Vu's predictors (arXiv 2310.17157) have no nonlinearity in between. Those of gates that have a bias add it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybrid_kernels.linear.op import linear
from hybrid_kernels.packed_matrix import PackedMatrix
from hybrid_kernels.team import Team


@dataclass(frozen=True, slots=True)
class MlpPredictor:
    """fc1: [rank, H]; fc2: [I, rank]; a neuron is predicted to fire when its logit is above threshold.

    bias: float32 [I], added to the logits. has_relu: whether what fc1 makes is cut off below 0.
    """

    fc1: PackedMatrix
    fc2: PackedMatrix
    threshold: float = 0.0
    bias: torch.Tensor | None = None
    has_relu: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError when the matrices and the bias do not chain."""
        if self.fc2.columns != self.fc1.num_rows:
            raise ValueError(f"fc2 reads {self.fc2.columns} values, but fc1 makes {self.fc1.num_rows}")
        if self.bias is not None and tuple(self.bias.shape) != (self.fc2.num_rows,):
            raise ValueError(f"the bias has shape {tuple(self.bias.shape)}, expected ({self.fc2.num_rows},)")

    @property
    def rank(self) -> int:
        """Width of the hidden layer; differs from layer to layer in real checkpoints."""
        return self.fc1.num_rows

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that it reads for one token."""
        bias_bytes = 0 if self.bias is None else 4 * len(self.bias)
        return self.fc1.num_bytes + self.fc2.num_bytes + bias_bytes

    def logits(self, predictor_input: torch.Tensor, team: Team) -> torch.Tensor:
        """predictor_input: [T, H] float32 -> [T, I] float32."""
        hidden = linear(predictor_input, self.fc1, team=team)  # [T, rank]
        return linear(torch.relu(hidden) if self.has_relu else hidden, self.fc2, self.bias, team=team)

    def active(self, predictor_input: torch.Tensor, team: Team) -> torch.Tensor:
        """predictor_input: [T, H] float32 -> bool [T, I]: the active set of each token."""
        return self.logits(predictor_input, team) > self.threshold
