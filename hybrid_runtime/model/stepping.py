"""What computes one token at a time, whether by the CPU alone or together with a GPU, and what tells its times."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch


class Timed(Protocol):
    """Times of a token's operations, in ticks of whatever clock."""

    def labels(self) -> list[str]:
        """Of the operations, in order."""

    def ticks_by_label(self) -> dict[str, int]:
        """Since the last reset."""

    def timeline(self) -> list[tuple[str, int, int]]:
        """Of the last token: each operation's label, when it began, and how long it took."""

    def reset_ticks(self) -> None:
        """Begin at zero."""


class Stepping(Protocol):
    """step_s: seconds that the last step took."""

    step_s: float

    @property
    def program(self) -> Timed:
        """Its times."""

    @property
    def read_rows(self) -> np.ndarray:
        """int64 [workers, 8]: gate, up and down rows that each worker of the CPU has read."""

    def step(self, token: int, position: int, num_positions: int) -> torch.Tensor:
        """Logits [V] float32 after one more token. Appends to the cache, whose length the caller advances.

        num_positions: how long the sequence is, or its prompt, which longrope rotates by. The tensor is overwritten by
        the next step.
        """
