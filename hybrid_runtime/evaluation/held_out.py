"""How well predictors do on text that nothing was counted or trained on: what they find, and what the model loses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    for tokens in windows.long():
        losses = torch.cat([_batch_losses(*batch) for batch in _batches(sequence, tokens, observer)])
        if not torch.isfinite(losses).all():
            raise NumericsError("the model computed NaN or Inf on held-out text")
        found.append(losses)
    return Losses(torch.stack(found))


def _batches(
    sequence: TokenSequence, tokens: torch.Tensor, observer: Observer | None, *, all_logits: bool = True
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One window's logits [T, V], a batch at a time, each with the tokens that follow."""
    decoder, cache = sequence.decoder, sequence.cache
    cache.truncate(0)
    for start in range(0, len(tokens), PREFILL_BATCH):
        batch = tokens[start : start + PREFILL_BATCH]
        logits = decoder.forward(batch, cache, all_logits=all_logits, prompt_end=len(tokens), observer=observer)
        yield logits, tokens[start + 1 : start + 1 + PREFILL_BATCH]


def _batch_losses(logits: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """float64 [T]; nothing follows a window's last token."""
    return torch.nn.functional.cross_entropy(logits[: len(following)], following, reduction="none").double()


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
    sequence: TokenSequence,
    windows: torch.Tensor,
    predictors: Sequence[Sequence[Predictor]],
    exact: Losses | None = None,
) -> tuple[list[Quality], Losses]:
    """By layer, how predictors do on what the exact model's neurons do, and the exact model's losses.

    sequence: the model in its exact mode, its config's predictor_input being where these predictors read the stream;
    windows: int [n, W]; predictors: by layer and expert; exact: the losses where they are known, no logits then.
    """
    config = sequence.decoder.config
    judge = _Judge(sequence, predictors)
    counter = FiringCounter(config, empty_layers(config, 1), torch.zeros(1, dtype=torch.int64), judge.see)
    losses = []
    for window in windows:
        if exact is None:
            losses.append(window_losses(sequence, window.unsqueeze(0), counter).losses)
            counter.finish()
        else:
            for _ in _batches(sequence, window.long(), counter, all_logits=False):
                counter.finish()
    return judge.qualities, exact or Losses(torch.cat(losses))
