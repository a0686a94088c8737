"""Two predictors that nobody would run: the best and the worst there can be, to see the others between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybrid_kernels.activation import Activation, activate
from hybrid_kernels.linear.op import linear
from hybrid_kernels.packed_matrix import Bundles
from hybrid_kernels.team import Team


@dataclass(frozen=True, slots=True)
class OraclePredictor:
    """Computes the neurons to say which of them fire: never wrong, and spares nothing."""

    bundles: Bundles
    activation: Activation
    threshold: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Of gate and up rows."""
        return self.bundles.data[:, :-1].numel()

    def logits(self, predictor_input: torch.Tensor, team: Team) -> torch.Tensor:
        """predictor_input: [T, H] float32, what the neurons read -> [T, I] float32: the size of each one's value."""
        bundles = self.bundles
        gate = linear(predictor_input, bundles.gate_proj, bundles.gate_bias, team=team) if bundles.has_gate else None
        return activate(
            self.activation, gate, linear(predictor_input, bundles.up_proj, bundles.up_bias, team=team)
        ).abs()

    def active(self, predictor_input: torch.Tensor, team: Team) -> torch.Tensor:
        """predictor_input: [T, H] float32 -> bool [T, I]."""
        return self.logits(predictor_input, team) > self.threshold


@dataclass(frozen=True, slots=True)
class RandomPredictor:
    """Draws uniform logits from 0 to 1 by seed, whatever the input: a threshold of 0.9 lets a tenth through."""

    num_neurons: int
    seed: int
    threshold: float = 0.5

    @property
    def num_bytes(self) -> int:
        """It has no weights."""
        return 0

    def logits(self, predictor_input: torch.Tensor, team: Team) -> torch.Tensor:
        """predictor_input: [T, H] float32, of which only T counts -> [T, I] float32."""
        del team
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(len(predictor_input), self.num_neurons, generator=generator)

    def active(self, predictor_input: torch.Tensor, team: Team) -> torch.Tensor:
        """predictor_input: [T, H] float32 -> bool [T, I]."""
        return self.logits(predictor_input, team) > self.threshold
