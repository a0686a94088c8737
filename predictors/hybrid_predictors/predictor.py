"""What every predictor is: a score for each neuron of one FFN, and a threshold above which it is computed."""

from __future__ import annotations

from typing import Protocol

import torch

from hybrid_kernels.team import Team


class Predictor(Protocol):
    """Says which neurons of one feed-forward network fire for a token, before any of them is computed."""

    @property
    def threshold(self) -> float:
        """A neuron is predicted to fire when its logit is above."""

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that it reads for one token."""

    def logits(self, predictor_input: torch.Tensor, team: Team) -> torch.Tensor:
        """predictor_input: [T, H] float32 -> [T, I] float32, larger where a neuron is likelier to fire."""

    def active(self, predictor_input: torch.Tensor, team: Team) -> torch.Tensor:
        """predictor_input: [T, H] float32 -> bool [T, I]: the active set of each token."""
