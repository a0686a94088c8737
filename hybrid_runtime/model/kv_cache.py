"""Keys and values of every token so far, in memory reserved once, so that a longer answer cannot need more of it."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from hybrid_kernels.attention.layout import KV_GROUP
from hybrid_kernels.packed_matrix import PackedMatrix
from hybrid_kernels.quantization.op import dequantize_rows, quantize_rows
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import UsageError

KvDtype = Literal["f32", "f16", "q8"]
KV_DTYPES: tuple[KvDtype, ...] = get_args(KvDtype)
_TORCH_DTYPES: dict[KvDtype, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "q8": torch.uint8}
Q8 = RowFormat("q8", KV_GROUP)


def position_bytes(config: ModelConfig, dtype: KvDtype) -> int:
    """Bytes of one layer's keys, or values, of one token."""
    width = config.num_key_value_heads * config.head_dim
    return Q8.row_bytes(width) if dtype == "q8" else width * _TORCH_DTYPES[dtype].itemsize


def kv_cache_bytes(config: ModelConfig, num_positions: int, dtype: KvDtype) -> int:
    """Bytes of a cache for num_positions tokens."""
    return 2 * config.num_hidden_layers * num_positions * position_bytes(config, dtype)


def check_kv_dtype(config: ModelConfig, dtype: KvDtype) -> None:
    """Raise UsageError for a type that the model's heads cannot have."""
    if dtype == "q8" and config.head_dim % KV_GROUP:
        raise UsageError(f"--kv-cache q8: head_dim {config.head_dim} is not a multiple of {KV_GROUP}; use f16")


class KvCache:
    """keys, values: [layers, positions, kv_heads, D], of q8 [layers, positions, bytes]; `length` positions are filled.

    q8 packs a position's keys of all heads into one row of the q8 format. Raises UsageError for a head_dim that is no
    multiple of its group.
    """

    def __init__(self, config: ModelConfig, num_positions: int, dtype: KvDtype) -> None:
        self.dtype = dtype
        self.length = 0
        self.head_dim = config.head_dim
        self.num_key_value_heads = config.num_key_value_heads
        check_kv_dtype(config, dtype)
        last = (position_bytes(config, dtype),) if dtype == "q8" else (config.num_key_value_heads, config.head_dim)
        shape = (config.num_hidden_layers, num_positions, *last)
        self.keys = torch.empty(shape, dtype=_TORCH_DTYPES[dtype])
        self.values = torch.empty(shape, dtype=_TORCH_DTYPES[dtype])

    @property
    def num_positions(self) -> int:
        """How many tokens fit."""
        return self.keys.shape[1]

    def append(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """keys, values: [T, kv_heads, D] of the new tokens -> all of this layer's, [length + T, kv_heads, D].

        The tokens count only once `length` is advanced, after every layer has appended.
        """
        end = self.length + len(keys)
        assert end <= self.num_positions, "the caller checks the context before the tokens are computed"
        self.keys[layer_idx, self.length : end] = self._packed(keys)
        self.values[layer_idx, self.length : end] = self._packed(values)
        return self._unpacked(self.keys[layer_idx, :end]), self._unpacked(self.values[layer_idx, :end])

    def truncate(self, length: int) -> None:
        """Forget the tokens from position length on."""
        assert 0 <= length <= self.length
        self.length = length

    def _packed(self, vectors: torch.Tensor) -> torch.Tensor:
        return quantize_rows(vectors.reshape(len(vectors), -1), Q8) if self.dtype == "q8" else vectors

    def _unpacked(self, rows: torch.Tensor) -> torch.Tensor:
        if self.dtype != "q8":
            return rows
        width = self.num_key_value_heads * self.head_dim
        packed = PackedMatrix(rows, width, Q8)
        return dequantize_rows(packed.rows, width, Q8).view(len(rows), self.num_key_value_heads, self.head_dim)
