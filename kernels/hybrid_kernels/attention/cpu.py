"""The reference's attention without repeated keys, a block of queries at a time, over only the keys a block can see.

Bound by the bytes of the cached keys and values; scores of one block take heads * BLOCK_QUERIES * S floats.
"""

from __future__ import annotations

import math

import torch

BLOCK_QUERIES = 128


def attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first_position: int, window: int | None = None
) -> torch.Tensor:
    """query: [T, heads, D] float32; keys, values: [S, kv_heads, D], S = first_position + T -> [T, heads, D] float32."""
    output = torch.empty_like(query)
    for start in range(0, len(query), BLOCK_QUERIES):
        stop = min(start + BLOCK_QUERIES, len(query))
        first = first_position + start
        oldest = 0 if window is None else max(0, first - window + 1)
        visible = slice(oldest, first_position + stop)
        output[start:stop] = _block(query[start:stop], keys[visible], values[visible], first, oldest, window)
    return output


def _block(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int, oldest: int, window: int | None
) -> torch.Tensor:
    """query at positions first ...; keys and values at positions oldest ... (everything the block can see)."""
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    grouped = query.view(num_tokens, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)  # [kv, group, T, D]
    grouped = grouped.reshape(num_kv_heads, -1, head_dim)  # [kv, group * T, D]
    scores = grouped @ keys.float().permute(1, 2, 0) / math.sqrt(head_dim)  # [kv, group * T, S]
    if num_tokens > 1 or window is not None:
        query_positions = torch.arange(first, first + num_tokens).unsqueeze(1)
        key_positions = torch.arange(oldest, oldest + len(keys)).unsqueeze(0)
        hidden = key_positions > query_positions
        if window is not None:
            hidden |= key_positions <= query_positions - window
        scores = scores.view(num_kv_heads, -1, num_tokens, len(keys)).masked_fill_(hidden, -math.inf)
        scores = scores.view(num_kv_heads, -1, len(keys))
    mixed = scores.softmax(dim=-1) @ values.float().permute(1, 0, 2)  # [kv, group * T, D]
    return (
        mixed.view(num_kv_heads, -1, num_tokens, head_dim).permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)
    )
