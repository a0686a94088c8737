"""A store as the source of another one: its rows unpacked and packed again, in another format.

What was rounded once stays rounded: q8 into f32 gives exactly the values that q8 stands for. It is for stores whose
checkpoint the user does not have, such as the model that the package carries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hybrid_kernels.packed_matrix import PackedMatrix
from hybrid_kernels.quantization.op import dequantize_rows, quantize_rows
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import CheckpointError
from hybrid_runtime.store.blocks import BLOCK_WEIGHTS
from hybrid_runtime.store.layout import Entry
from hybrid_runtime.store.reader import Store


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """A finished store as the WeightSource of another."""

    store: Store

    @property
    def name(self) -> str:
        """Its path."""
        return str(self.store.folder)

    @property
    def config(self) -> ModelConfig:
        """The model's description."""
        return self.store.manifest.config

    @property
    def largest_held_bytes(self) -> int:
        """Of the largest part, which is mapped while it is read."""
        return max(part.num_bytes for part in self.store.manifest.parts)

    def predictor_ranks(self) -> dict[str, int]:
        """Width of each embedded predictor by its FFN's prefix."""
        return self.store.manifest.predictor_ranks

    def fingerprint(self) -> str:
        """Of the manifest, which holds every part's digest."""
        return hashlib.sha256(self.store.manifest.to_json().encode()).hexdigest()

    def blocks(self, entry: Entry) -> Iterator[torch.Tensor]:
        """The entry's bytes in order, uint8. Raise CheckpointError for weights that the format cannot hold."""
        (part,) = (part for part in self.store.manifest.parts if any(each.name == entry.name for each in part.entries))
        weight = self.store.read_parts([part], "mmap")[0][entry.name]
        if isinstance(weight, torch.Tensor):
            yield weight.contiguous().view(torch.uint8)
            return
        columns = entry.shape[-1]
        rows = weight.rows if isinstance(weight, PackedMatrix) else weight.data.flatten(0, 1)  # [rows, row_bytes]
        for block in torch.split(rows, max(1, BLOCK_WEIGHTS // columns)):
            yield _repacked(block, columns, weight.row_format, entry)


def _repacked(rows: torch.Tensor, columns: int, stored: RowFormat, entry: Entry) -> torch.Tensor:
    if stored == entry.row_format:
        return rows.clone()
    try:
        return quantize_rows(dequantize_rows(rows, columns, stored), entry.row_format)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{entry.name} cannot be written as {entry.row_format}: {error}") from error
