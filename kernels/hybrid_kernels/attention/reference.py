"""Grouped-query attention of new tokens over cached keys and values, causal, with an optional sliding window."""

from __future__ import annotations

import math

import torch


def attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first_position: int, window: int | None = None
) -> torch.Tensor:
    """query: [T, heads, D] float32, from first_position on; keys, values: [S, kv_heads, D], S = first_position + T.

    A query at position p sees keys p - window + 1 ... p (all up to p without a window) -> [T, heads, D] float32.
    """
    num_tokens, num_heads, head_dim = query.shape
    group = num_heads // keys.shape[1]
    query_positions = torch.arange(first_position, first_position + num_tokens).unsqueeze(1)
    key_positions = torch.arange(len(keys)).unsqueeze(0)
    visible = key_positions <= query_positions  # [T, S]
    if window is not None:
        visible &= key_positions > query_positions - window
    keys = keys.float().repeat_interleave(group, dim=1)  # [S, heads, D]
    values = values.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("thd,shd->hts", query, keys) / math.sqrt(head_dim)
    weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
    return torch.einsum("hts,shd->thd", weights, values)
