"""Rotary positions of new queries and keys, and their way into the cache, in one kernel on the GPU."""

from __future__ import annotations

import torch

from hybrid_kernels.attention.gpu import LayerCache
from hybrid_kernels.attention.layout import KV_GROUP
from hybrid_kernels.rope.gpu_kernels import rotate_and_append_kernel


def rotate_and_append(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    positions: torch.Tensor,
    cache: LayerCache,
) -> None:
    """queries: [T, heads, D] float32, rotated in place; keys, values: [T, kv_heads, D] float32, written to the cache.

    rotation: cosines and sines, float32 [all positions, D / 2], magnitude included; None: nothing is rotated.
    positions: int32 [T].
    """
    num_tokens, num_heads, head_dim = queries.shape
    key_cache, value_cache, key_scales, value_scales = cache.views()
    cosines, sines = (queries, queries) if rotation is None else rotation
    rotate_and_append_kernel[(num_tokens, num_heads + 2 * cache.num_kv_heads)](
        queries,
        keys,
        values,
        cosines,
        sines,
        positions,
        key_cache,
        value_cache,
        key_scales,
        value_scales,
        key_cache.stride(0),
        key_scales.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=cache.num_kv_heads,
        HEAD_DIM=head_dim,
        ROTATES=rotation is not None,
        KIND=cache.kind,
        GROUP=KV_GROUP,
    )
