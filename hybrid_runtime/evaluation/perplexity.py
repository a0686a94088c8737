"""Perplexity over a text, by two named protocols that give different numbers on the same model.

full   windows that do not overlap; every token is scored, the first of a window by the last of the one before it
       (the text's own first by BOS, where the vocabulary puts one)
half   llama.cpp's: the first token of each whole window is replaced by BOS (where the vocabulary puts one), and only
       what follows token window / 2 is scored: 255 of 512, each with more than half a window before it
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch

from hybrid_runtime.engine import Engine
from hybrid_runtime.errors import NumericsError, UsageError

Protocol = Literal["full", "half"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

OnWindow = Callable[["Perplexity"], None]


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Sums over the tokens scored so far; natural logarithms."""

    protocol: Protocol
    window: int
    num_windows: int = 0
    num_scored: int = 0
    sum_loss: float = 0.0
    sum_squared_loss: float = 0.0

    @property
    def mean_loss(self) -> float:
        """Nats per token."""
        return self.sum_loss / self.num_scored

    @property
    def value(self) -> float:
        """The exponential of the mean loss."""
        return math.exp(self.mean_loss)

    @property
    def standard_error(self) -> float:
        """Of the perplexity, from the spread of the tokens' losses taken as independent."""
        if self.num_scored < 2:
            return math.nan
        variance = max(0.0, self.sum_squared_loss / self.num_scored - self.mean_loss**2)
        return self.value * math.sqrt(variance / (self.num_scored - 1))

    def to_json(self) -> dict[str, object]:
        """Fields and results as plain values."""
        return asdict(self) | {
            "perplexity": self.value,
            "standard_error": self.standard_error,
            "mean_loss": self.mean_loss,
        }


def measure_perplexity(
    engine: Engine,
    text: str,
    protocol: Protocol,
    window: int,
    on_window: OnWindow | None = None,
    *,
    max_windows: int | None = None,
) -> Perplexity:
    """Score the text in windows of that many tokens; on_window is called after each with the result so far.

    Raises UsageError when the text is too short for one window, NumericsError when the model computes NaN.
    """
    tokens = engine.tokenizer.encode(text)
    result = Perplexity(protocol, window)
    for inputs, first_scored in itertools.islice(_windows(engine, tokens, protocol, window), max_windows):
        losses = _losses(engine, inputs)[first_scored - 1 :]
        if not torch.isfinite(losses).all():
            raise NumericsError(f"the model computed NaN or Inf in window {result.num_windows + 1}")
        result = Perplexity(
            protocol,
            window,
            result.num_windows + 1,
            result.num_scored + len(losses),
            result.sum_loss + losses.sum().item(),
            result.sum_squared_loss + losses.square().sum().item(),
        )
        if on_window is not None:
            on_window(result)
    return result


def _losses(engine: Engine, tokens: Sequence[int]) -> torch.Tensor:
    """tokens: [T] -> [T - 1] float64: minus the logarithm of the probability of each token but the first."""
    targets = torch.tensor(tokens[1:])
    losses = []
    for logits in engine.logit_batches(tokens[:-1]):
        scored, targets = targets[: len(logits)], targets[len(logits) :]
        losses.append(torch.nn.functional.cross_entropy(logits, scored, reduction="none").double())
    return torch.cat(losses)


def _windows(
    engine: Engine, tokens: Sequence[int], protocol: Protocol, window: int
) -> Iterator[tuple[Sequence[int], int]]:
    """Tokens that a window reads and predicts, each with the index of its first scored token."""
    if window < 2 or (protocol == "half" and window < 4):
        raise UsageError(f"--ctx {window}: protocol {protocol} needs at least {4 if protocol == 'half' else 2} tokens")
    needed = window if protocol == "half" else 2
    if len(tokens) < needed:
        raise UsageError(f"the text has {len(tokens)} tokens, protocol {protocol} needs at least {needed}")
    if protocol == "half":
        for start in range(0, len(tokens) - window + 1, window):
            inputs = list(tokens[start : start + window])
            if engine.tokenizer.add_bos and engine.tokenizer.bos_id is not None:
                inputs[0] = engine.tokenizer.bos_id
            yield inputs, window // 2 + 1
    else:
        for start in range(0, len(tokens) - 1, window):
            yield tokens[start : start + window + 1], 1  # the last is only predicted: it opens the next window
