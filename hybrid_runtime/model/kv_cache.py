"""Keys and values of every token so far, in memory reserved once, so that a longer answer cannot need more of it."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from hybrid_runtime.config import ModelConfig

KvDtype = Literal["f32", "f16"]
KV_DTYPES: tuple[KvDtype, ...] = get_args(KvDtype)
_TORCH_DTYPES: dict[KvDtype, torch.dtype] = {"f32": torch.float32, "f16": torch.float16}


def kv_cache_bytes(config: ModelConfig, num_positions: int, dtype: KvDtype) -> int:
    """Bytes of a cache for num_positions tokens."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return per_token * num_positions * _TORCH_DTYPES[dtype].itemsize


class KvCache:
    """keys, values: [layers, positions, kv_heads, D]; `length` positions are filled."""

    def __init__(self, config: ModelConfig, num_positions: int, dtype: KvDtype) -> None:
        shape = (config.num_hidden_layers, num_positions, config.num_key_value_heads, config.head_dim)
        self.keys = torch.empty(shape, dtype=_TORCH_DTYPES[dtype])
        self.values = torch.empty(shape, dtype=_TORCH_DTYPES[dtype])
        self.length = 0

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
        self.keys[layer_idx, self.length : end] = keys
        self.values[layer_idx, self.length : end] = values
        return self.keys[layer_idx, :end], self.values[layer_idx, :end]

    def truncate(self, length: int) -> None:
        """Forget the tokens from position length on."""
        assert 0 <= length <= self.length
        self.length = length
