"""How well predictors do on text that nothing was counted or trained on: what they find, and what the model loses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hybrid_predictors.predictor import Predictor
from hybrid_predictors.thresholds import Quality, measured_sets
from hybrid_runtime.budget import PREFILL_BATCH
from hybrid_runtime.errors import NumericsError
from hybrid_runtime.generation.sequence import TokenSequence
from hybrid_runtime.model.observer import FfnPass, Observer
from hybrid_runtime.profiling.counting import FiringCounter
from hybrid_runtime.profiling.profile import empty_layers

NO_TOKENS = Quality(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Losses:
    """losses: float64 [n, W - 1], nats of every token but each window's first."""

    losses: torch.Tensor

    @property
    def perplexity(self) -> float:
        """Over all tokens."""
        return math.exp(float(self.losses.mean()))

    def increase_over(self, exact: Losses) -> tuple[float, float]:
        """Relative increase of the perplexity, and its standard error, from pairs of the same tokens."""
        differences = (self.losses - exact.losses).flatten()
        error = float(differences.std()) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
        return math.expm1(float(differences.mean())), error


def window_losses(sequence: TokenSequence, windows: torch.Tensor, observer: Observer | None = None) -> Losses:
    """windows: int [n, W]. Raise NumericsError when the model computes NaN or Inf."""
    found = []
    decoder, cache = sequence.decoder, sequence.cache
    for tokens in windows.long():
        cache.truncate(0)
        logits = [
            decoder.forward(
                tokens[start : start + PREFILL_BATCH], cache, all_logits=True, prompt_end=len(tokens), observer=observer
            )
            for start in range(0, len(tokens), PREFILL_BATCH)
        ]
        losses = torch.nn.functional.cross_entropy(torch.cat(logits)[:-1], tokens[1:], reduction="none").double()
        if not torch.isfinite(losses).all():
            raise NumericsError("the model computed NaN or Inf on held-out text")
        found.append(losses)
    return Losses(torch.stack(found))


class _Judge:
    """Compares predictions with what fired."""

    def __init__(self, sequence: TokenSequence, predictors: Sequence[Sequence[Predictor]]) -> None:
        self._team = sequence.decoder.team
        self._predictors = predictors
        self.qualities = [NO_TOKENS] * len(predictors)

    def see(self, ffn: FfnPass, active: torch.Tensor) -> None:
        """active: bool [n, I]."""
        named = self._predictors[ffn.layer_idx][ffn.expert_idx].active(ffn.predictor_input, self._team)
        quality = measured_sets(named, active)
        self.qualities[ffn.layer_idx] = self.qualities[ffn.layer_idx] + quality


def judged(
    sequence: TokenSequence, windows: torch.Tensor, predictors: Sequence[Sequence[Predictor]]
) -> tuple[list[Quality], Losses]:
    """By layer, how predictors do on what the exact model's neurons do, and the exact model's losses.

    sequence: the model in its exact mode; windows: int [n, W]; predictors: by layer and expert.
    """
    config = sequence.decoder.config
    judge = _Judge(sequence, predictors)
    counter = FiringCounter(config, empty_layers(config, 1), torch.zeros(1, dtype=torch.int64), judge.see)
    losses = []
    for window in windows:
        losses.append(window_losses(sequence, window.unsqueeze(0), counter).losses)
        counter.finish()
    return judge.qualities, Losses(torch.cat(losses))
