"""Grouped-query attention over a key-value cache: argument checks and dispatch."""

from __future__ import annotations

import torch

from hybrid_kernels.attention import cpu


def attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first_position: int, window: int | None = None
) -> torch.Tensor:
    """query: [T, heads, D] float32; keys, values: [S, kv_heads, D] float32 or float16, S = first_position + T.

    A query at position p sees keys p - window + 1 ... p (all up to p without a window) -> [T, heads, D] float32.
    Raises ValueError when the shapes do not fit, or the window is below 1.
    """
    fits = query.dim() == keys.dim() == 3 and keys.shape == values.shape and query.shape[2] == keys.shape[2]
    if not fits or query.shape[1] % keys.shape[1]:
        raise ValueError(
            f"query {tuple(query.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)} do not fit"
        )
    if first_position < 0 or len(keys) != first_position + len(query):
        raise ValueError(f"{len(keys)} keys for {len(query)} tokens after {first_position}")
    if window is not None and window < 1:
        raise ValueError(f"window {window} is below 1")
    return cpu.attention(query, keys, values, first_position, window)
