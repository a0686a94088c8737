"""The bytes of one entry of a store, a block at a time, out of a checkpoint: this is what bounds a conversion's memory.

The one thing held whole is a down projection, as the checkpoint's own bytes, because its columns become rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from hybrid_kernels.quantization.op import quantize_rows
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.checkpoints.checkpoint import Checkpoint
from hybrid_runtime.checkpoints.gguf_blocks import BLOCK_FORMATS
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import CheckpointError
from hybrid_runtime.store.layout import Entry
from hybrid_runtime.store.repack import can_repack, repack_rows

BLOCK_WEIGHTS = 1 << 22  # 16 MiB as float32, and a few temporaries of that size


@dataclass(frozen=True, slots=True)
class CheckpointWeights:
    """A published checkpoint as the WeightSource of a store."""

    checkpoint: Checkpoint

    @property
    def name(self) -> str:
        """Its path."""
        return str(self.checkpoint.path)

    @property
    def config(self) -> ModelConfig:
        """The model's description."""
        return self.checkpoint.config

    @property
    def largest_held_bytes(self) -> int:
        """Of the tensors that are held whole, as float32."""
        checkpoint = self.checkpoint
        return max(
            4 * math.prod(info.shape)
            for name, info in checkpoint.tensors.items()
            if name.endswith(".down_proj") or name in checkpoint.interleaved_heads
        )

    def predictor_ranks(self) -> dict[str, int]:
        """Width of each embedded predictor by its FFN's prefix."""
        return self.checkpoint.predictor_ranks()

    def fingerprint(self) -> str:
        """Of the configuration and the files as they are at this moment."""
        return self.checkpoint.fingerprint()

    def blocks(self, entry: Entry) -> Iterator[torch.Tensor]:
        """The entry's bytes in order, uint8. Raise CheckpointError naming the tensor that cannot be written so."""
        return entry_blocks(self.checkpoint, entry)


def entry_blocks(checkpoint: Checkpoint, entry: Entry) -> Iterator[torch.Tensor]:
    """The entry's bytes in order, uint8. Raise CheckpointError naming the tensor that cannot be written so."""
    if entry.kind == "vector":
        yield _vector(checkpoint, entry)
    elif entry.kind == "rows":
        yield from _row_blocks(checkpoint, entry)
    else:
        yield from _bundle_blocks(checkpoint, entry)


def _vector(checkpoint: Checkpoint, entry: Entry) -> torch.Tensor:
    return _packed(checkpoint, entry.name, checkpoint.read(entry.name)[None], entry.row_format)[0, : entry.num_bytes]


def _row_blocks(checkpoint: Checkpoint, entry: Entry) -> Iterator[torch.Tensor]:
    num_rows, columns = entry.shape
    for start, stop in _ranges(num_rows, columns):
        yield _rows(checkpoint, entry.name, start, stop, entry.row_format)


def _bundle_blocks(checkpoint: Checkpoint, entry: Entry) -> Iterator[torch.Tensor]:
    num_neurons, num_parts, hidden_size = entry.shape
    ffn = entry.name.removesuffix(".bundles")
    names = [f"{ffn}.gate_proj", f"{ffn}.up_proj"][3 - num_parts :]
    down_name = f"{ffn}.down_proj"
    down_columns = None if checkpoint.down_is_transposed else _hold_columns(checkpoint, down_name)
    for start, stop in _ranges(num_neurons, hidden_size):
        parts = [_rows(checkpoint, name, start, stop, entry.row_format) for name in names]
        if down_columns is None:
            parts.append(_rows(checkpoint, down_name, start, stop, entry.row_format))
        else:
            parts.append(_packed(checkpoint, down_name, down_columns(start, stop), entry.row_format))
        yield torch.stack(parts, dim=1)  # [neurons, parts, row_bytes]


def _hold_columns(checkpoint: Checkpoint, name: str) -> Callable[[int, int], torch.Tensor]:
    """Read the matrix [H, I]; the function returned gives its columns [start, stop) as rows, [stop - start, H]."""
    info = checkpoint.tensors[name]
    block_format = BLOCK_FORMATS.get(info.dtype)
    if block_format is None:
        matrix = checkpoint.read(name)
        return lambda start, stop: matrix[:, start:stop].T.contiguous()
    # Kept as blocks: as float32 the matrix would be seven times its size in the file.
    num_rows, width = info.shape[0], block_format.num_elements
    blocks = checkpoint.read_raw(name, 0, num_rows).view(num_rows, -1, block_format.num_bytes)

    def columns(start: int, stop: int) -> torch.Tensor:
        first = start // width
        wanted = blocks[:, first : -(-stop // width)].reshape(-1, block_format.num_bytes)
        values = block_format.dequantize(wanted).view(num_rows, -1)
        return values[:, start - first * width : stop - first * width].T.contiguous()

    return columns


def _rows(checkpoint: Checkpoint, name: str, start: int, stop: int, row_format: RowFormat) -> torch.Tensor:
    info = checkpoint.tensors[name]
    if can_repack(info.dtype, info.shape[1], row_format):
        return repack_rows(checkpoint.read_raw(name, start, stop), info.dtype, row_format)
    return _packed(checkpoint, name, checkpoint.read(name, start, stop), row_format)


def _packed(checkpoint: Checkpoint, name: str, weights: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    try:
        return quantize_rows(weights.float() if weights.dtype == torch.float64 else weights, row_format)
    except (TypeError, ValueError) as error:
        info = checkpoint.tensors[name]
        raise CheckpointError(f"{info.path}: tensor {info.name} cannot be written as {row_format}: {error}") from error


def _ranges(num_rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_WEIGHTS // columns)
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)
