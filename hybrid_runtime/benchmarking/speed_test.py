"""Timed prefills and decodes with random token ids, as llama-bench does them: no text, no sampling.

A test is a prompt of `num_prompt` tokens, then `num_generated` single ones, after `depth` tokens that are not timed.
What the decoder counts is kept beside each time. How results are shown is not known here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from hybrid_runtime.budget import PREFILL_BATCH
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.model.kv_cache import KvCache

SEED = 0


class Counters(Protocol):
    """What a decoder counts. kernel_s: seconds inside compiled code; the rest: of tokens decoded one at a time."""

    @property
    def kernel_s(self) -> float: ...  # noqa: D102
    @property
    def active_neurons(self) -> int: ...  # noqa: D102
    @property
    def gate_rows(self) -> int: ...  # noqa: D102
    @property
    def up_rows(self) -> int: ...  # noqa: D102
    @property
    def down_rows(self) -> int: ...  # noqa: D102
    def reset(self) -> None: ...  # noqa: D102


class CountingDecoder(Protocol):
    """The part of a Decoder that is measured."""

    @property
    def config(self) -> ModelConfig: ...  # noqa: D102

    @property
    def counters(self) -> Counters: ...  # noqa: D102

    def forward(self, tokens: torch.Tensor, cache: KvCache, *, prompt_end: int = 0) -> torch.Tensor: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class SpeedTest:
    """One row of the table."""

    num_prompt: int
    num_generated: int
    depth: int

    @property
    def num_tokens(self) -> int:
        """Tokens that are timed."""
        return self.num_prompt + self.num_generated

    @property
    def num_positions(self) -> int:
        """The context that it needs."""
        return self.depth + self.num_tokens

    @property
    def is_decode(self) -> bool:
        """Whether only single tokens are timed, so that bytes a token mean something."""
        return self.num_prompt == 0

    @property
    def mean_length(self) -> float:
        """Tokens that a generated one attends to, on average."""
        return self.depth + self.num_prompt + (self.num_generated + 1) / 2

    @property
    def label(self) -> str:
        """As llama-bench writes it: pp512, tg128, pp512+tg128, tg128 @ d4096."""
        parts = [f"pp{self.num_prompt}"] * (self.num_prompt > 0) + [f"tg{self.num_generated}"] * (
            self.num_generated > 0
        )
        return "+".join(parts) + (f" @ d{self.depth}" if self.depth else "")


@dataclass(frozen=True, slots=True)
class Sample:
    """One repetition. The counts are those of its own tokens."""

    seconds: float
    kernel_s: float
    active_neurons: int
    gate_rows: int
    up_rows: int
    down_rows: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """A test and its repetitions."""

    test: SpeedTest
    samples: tuple[Sample, ...]

    @property
    def speeds(self) -> list[float]:
        """Tokens a second of each repetition."""
        return [self.test.num_tokens / sample.seconds for sample in self.samples]

    @property
    def mean_speed(self) -> float:
        """Tokens a second."""
        return statistics.fmean(self.speeds)

    @property
    def overhead(self) -> float:
        """Share of the time outside compiled code."""
        return 1 - sum(sample.kernel_s for sample in self.samples) / sum(sample.seconds for sample in self.samples)

    def per_token(self, count: Literal["active_neurons", "gate_rows", "up_rows", "down_rows"]) -> float:
        """Mean over the timed tokens of one of the Sample's counts; of a decode, because prompts count no rows."""
        total: int = sum(getattr(sample, count) for sample in self.samples)
        return total / (len(self.samples) * self.test.num_tokens)


def deviation(values: list[float]) -> float:
    """Standard deviation of a sample, 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def measure(
    decoder: CountingDecoder, cache: KvCache, test: SpeedTest, *, repetitions: int, warms_up: bool
) -> Measurement:
    """Run the test; the cache must hold test.num_positions tokens, and is left with test.depth of them."""
    tokens = torch.Generator().manual_seed(SEED)
    cache.truncate(0)
    _prefill(decoder, cache, _random(decoder, test.depth, tokens))
    if warms_up:
        _prefill(decoder, cache, _random(decoder, test.num_prompt, tokens))
        _generate(decoder, cache, _random(decoder, min(1, test.num_generated), tokens))
    return Measurement(test, tuple(_samples(decoder, cache, test, repetitions, tokens)))


def _samples(
    decoder: CountingDecoder, cache: KvCache, test: SpeedTest, repetitions: int, tokens: torch.Generator
) -> Iterator[Sample]:
    counters = decoder.counters
    for _ in range(repetitions):
        cache.truncate(test.depth)
        prompt, generated = (_random(decoder, count, tokens) for count in (test.num_prompt, test.num_generated))
        counters.reset()
        started_s = time.perf_counter()
        _prefill(decoder, cache, prompt)
        _generate(decoder, cache, generated)
        seconds = time.perf_counter() - started_s
        counts = (counters.active_neurons, counters.gate_rows, counters.up_rows, counters.down_rows)
        yield Sample(seconds, counters.kernel_s, *counts)
    cache.truncate(test.depth)


def _random(decoder: CountingDecoder, count: int, tokens: torch.Generator) -> torch.Tensor:
    return torch.randint(0, decoder.config.vocab_size, (count,), dtype=torch.int64, generator=tokens)


def _prefill(decoder: CountingDecoder, cache: KvCache, prompt: torch.Tensor) -> None:
    end = cache.length + len(prompt)
    for start in range(0, len(prompt), PREFILL_BATCH):
        decoder.forward(prompt[start : start + PREFILL_BATCH], cache, prompt_end=end)


def _generate(decoder: CountingDecoder, cache: KvCache, tokens: torch.Tensor) -> None:
    for idx in range(len(tokens)):
        decoder.forward(tokens[idx : idx + 1], cache)
