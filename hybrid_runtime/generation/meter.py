"""What decoding has spent its time on since one looked last: by the kernels' own counters.

Read between two tokens; nothing here slows a token down.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from hybrid_runtime.generation.sequence import TokenSequence
from hybrid_runtime.tiers.disk_cache import TierCounts

GPU_LABELS = frozenset({"hot neurons", "down rows", "wait for the GPU"})  # the last: of one that is there
VALUE_BYTES = 8  # of a cold neuron that fired, on its way to the GPU: its number and its value


@dataclass(frozen=True, slots=True)
class Spent:
    """tokens: decoded one at a time. cpu_s, gpu_s: of compiled code; wait_s: of that, for the disk, by a worker on
    average; crossed_bytes: between CPU and GPU; tiers: None where all neurons are in one memory.
    """

    tokens: int
    seconds: float
    cpu_s: float
    gpu_s: float
    wait_s: float
    crossed_bytes: int
    tiers: TierCounts | None

    @property
    def tokens_per_s(self) -> float:
        """0 before the first."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class DecodeMeter:
    """Of one sequence. `lap` tells what was spent since the lap before, `total` since the meter was made."""

    def __init__(self, sequence: TokenSequence) -> None:
        self._sequence = sequence
        self._start = self._last = self._look()

    def lap(self) -> Spent:
        """Since the last lap."""
        before, self._last = self._last, self._look()
        return self._between(before, self._last)

    def total(self) -> Spent:
        """Since the beginning."""
        return self._between(self._start, self._look())

    def _look(self) -> _Reading:
        decoder, cache = self._sequence.decoder, self._sequence.cache
        program, tiering = decoder.program_of(cache), decoder.weights.tiering
        return _Reading(
            decoder.steps,
            program.ticks_by_label(),
            decoder.step_s,
            None if tiering is None else _with_hot(tiering.cache.counts(), decoder.hot_neurons(cache)),
            decoder.counters.carried_values,
        )

    def _between(self, before: _Reading, after: _Reading) -> Spent:
        ticks = {label: count - before.ticks.get(label, 0) for label, count in after.ticks.items()}
        kernel_s, tokens = after.step_s - before.step_s, after.tokens - before.tokens
        per_tick = kernel_s / max(1, sum(ticks.values()))
        gpu_s = per_tick * sum(count for label, count in ticks.items() if label in GPU_LABELS)
        tiers = None if after.tiers is None or before.tiers is None else _difference(before.tiers, after.tiers)
        decoder = self._sequence.decoder
        threads = decoder.team.num_threads
        wait_s = 0.0 if tiers is None else per_tick * tiers.stall_ticks / threads
        crossed = (
            tokens * decoder.crossed_bytes(self._sequence.cache)
            + (after.carried_values - before.carried_values) * VALUE_BYTES
        )
        seconds = after.step_s - before.step_s  # not what prompts, printing and the user took in between
        return Spent(tokens, seconds, kernel_s - gpu_s - wait_s, gpu_s, wait_s, crossed, tiers)


@dataclass(frozen=True, slots=True)
class _Reading:
    """Counters at one moment."""

    tokens: int
    ticks: dict[str, int]
    step_s: float
    tiers: TierCounts | None
    carried_values: int


def _with_hot(counts: TierCounts, hot_neurons: int) -> TierCounts:
    return replace(counts, hot_neurons=counts.hot_neurons + hot_neurons)


def _difference(before: TierCounts, after: TierCounts) -> TierCounts:
    return TierCounts(*(getattr(after, field.name) - getattr(before, field.name) for field in fields(TierCounts)))
