"""What a decoder shows to who watches a batch go through it: routing, and the value of every neuron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class FfnPass:
    """Tokens of a batch that go through one feed-forward network.

    tokens: int64 [n], ascending, which of the batch; None: all. predictor_input: float32 [n, H], where the model's
    predictors read the stream (after the norm, for a model that has none).
    """

    layer_idx: int
    expert_idx: int
    tokens: torch.Tensor | None
    predictor_input: torch.Tensor


class Observer(Protocol):
    """Called while Decoder.forward computes, layer after layer; must not keep or change what it is shown."""

    def see_routing(self, layer_idx: int, experts: torch.Tensor) -> None:
        """experts: int64 [T, k], to which each token of the batch goes; only in a mixture, before its neurons."""

    def see_neurons(self, ffn: FfnPass, neurons: slice | torch.Tensor, values: torch.Tensor) -> None:
        """neurons: slice or int64 [N]; values: float32 [n, N]. Neurons that a predictor ruled out are not shown."""
