"""Where the weights of a store come from, as much of it as writing a store needs to know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from hybrid_runtime.config import ModelConfig
from hybrid_runtime.store.layout import Entry


class WeightSource(Protocol):
    """A checkpoint, or weights that are made up on the spot. The same source gives the same bytes at every call."""

    @property
    def name(self) -> str:
        """What messages call it: a path, where it has one."""

    @property
    def config(self) -> ModelConfig:
        """The model's description."""

    @property
    def largest_held_bytes(self) -> int:
        """Of the largest thing that `blocks` holds whole, beside the blocks themselves."""

    def predictor_ranks(self) -> dict[str, int]:
        """Width of each embedded predictor by its FFN's prefix."""

    def fingerprint(self) -> str:
        """What tells this source from every other, and from itself as it was before it changed."""

    def blocks(self, entry: Entry) -> Iterator[torch.Tensor]:
        """The entry's bytes in order, uint8. Raise CheckpointError naming what cannot be written so."""
