"""A predictor made for what neurons read, used where a model's predictors read the stream before the norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hybrid_kernels.team import Team
from hybrid_predictors.predictor import Predictor


@dataclass(frozen=True, slots=True)
class NormedPredictor:
    """norm: float32 [T, H] -> [T, H], the network's own."""

    inner: Predictor
    norm: Callable[[torch.Tensor], torch.Tensor]

    @property
    def threshold(self) -> float:
        """The inner one's."""
        return self.inner.threshold

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that it reads for one token."""
        return self.inner.num_bytes

    def logits(self, predictor_input: torch.Tensor, team: Team) -> torch.Tensor:
        """predictor_input: [T, H] float32, before the norm -> [T, I] float32."""
        return self.inner.logits(self.norm(predictor_input), team)

    def active(self, predictor_input: torch.Tensor, team: Team) -> torch.Tensor:
        """predictor_input: [T, H] float32, before the norm -> bool [T, I]: the active set of each token."""
        return self.inner.active(self.norm(predictor_input), team)
