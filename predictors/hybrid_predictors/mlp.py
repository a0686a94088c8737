"""The low-rank predictor that TurboSparse checkpoints carry: which neurons of one FFN fire for a token.

    m = 1 where fc2(relu(fc1(p))) > threshold, else 0

The published forward multiplies by round(sigmoid(logit)), which is this with threshold 0 (half rounds to even, so to
0). PowerInfer's files may carry another threshold. What `p` is, the checkpoint's family says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybrid_kernels.linear.op import linear
from hybrid_kernels.packed_matrix import PackedMatrix
from hybrid_kernels.team import Team


@dataclass(frozen=True, slots=True)
class MlpPredictor:
    """fc1: [rank, H]; fc2: [I, rank]; a neuron is predicted to fire when its logit is above threshold."""

    fc1: PackedMatrix
    fc2: PackedMatrix
    threshold: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError when the two matrices do not chain."""
        if self.fc2.columns != self.fc1.num_rows:
            raise ValueError(f"fc2 reads {self.fc2.columns} values, but fc1 makes {self.fc1.num_rows}")

    @property
    def rank(self) -> int:
        """Width of the hidden layer; differs from layer to layer in real checkpoints."""
        return self.fc1.num_rows

    def logits(self, predictor_input: torch.Tensor, team: Team) -> torch.Tensor:
        """predictor_input: [T, H] float32 -> [T, I] float32."""
        hidden = torch.relu(linear(predictor_input, self.fc1, team=team))  # [T, rank]
        return linear(hidden, self.fc2, team=team)

    def active(self, predictor_input: torch.Tensor, team: Team) -> torch.Tensor:
        """predictor_input: [T, H] float32 -> bool [T, I]: the active set of each token."""
        return self.logits(predictor_input, team) > self.threshold
