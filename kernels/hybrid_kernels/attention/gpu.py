"""Grouped-query attention of new tokens over a cache on the GPU, split over positions, for decoding.

The cache may be f32, f16 or q8 (row_format's q8 rows, group 32, a row a position). How many tokens it holds is read on
the device, so that one grid, and one CUDA graph, serves every length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from hybrid_kernels.attention.gpu_kernels import attend_kernel, combine_kernel
from hybrid_kernels.attention.layout import KV_GROUP
from hybrid_kernels.quantization.row_format import RowFormat

LEAST_QUERIES = 16  # of a tensor core's instruction
BLOCK = {"f32": 32, "f16": 64, "q8": 32}  # positions, as many as registers hold with their scales
NUM_SPLITS = 16  # a power of two


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys and values: [positions, kv_heads, D] float32 or float16; of q8, uint8 [positions, row_bytes]."""

    keys: torch.Tensor
    values: torch.Tensor
    num_kv_heads: int
    head_dim: int

    @property
    def kind(self) -> str:
        """What a kernel reads."""
        return {torch.float32: "f32", torch.float16: "f16", torch.uint8: "q8"}[self.keys.dtype]

    def views(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values, and the scales of both from the first one on; the values themselves where there are none."""
        if self.kind != "q8":
            return self.keys, self.values, self.keys, self.values
        start = RowFormat("q8", KV_GROUP).value_bytes(self.num_kv_heads * self.head_dim) // 2
        scales = [rows.view(torch.float16)[:, start:] for rows in (self.keys, self.values)]
        return self.keys.view(torch.int8), self.values.view(torch.int8), scales[0], scales[1]


def attention(
    query: torch.Tensor, cache: LayerCache, positions: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """query: [T, heads, D] float32; positions: [T] int32, whose keys are in the cache -> [T, heads, D] float32.

    A query at position p sees keys p - window + 1 ... p (all up to p without a window).
    """
    num_tokens, num_heads, head_dim = query.shape
    keys, values, key_scales, value_scales = cache.views()
    shape = (num_tokens, num_heads, NUM_SPLITS)
    partial = torch.empty(*shape, head_dim, device=query.device)
    partial_max, partial_sum = torch.empty(shape, device=query.device), torch.empty(shape, device=query.device)
    group = num_heads // cache.num_kv_heads
    attend_kernel[(num_tokens, cache.num_kv_heads, NUM_SPLITS)](
        query,
        keys,
        values,
        key_scales,
        value_scales,
        positions,
        partial,
        partial_max,
        partial_sum,
        keys.stride(0),
        key_scales.stride(0),
        0 if window is None else window,
        1 / math.sqrt(head_dim),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=cache.num_kv_heads,
        HEAD_DIM=head_dim,
        KIND=cache.kind,
        GROUP=KV_GROUP,
        QUERIES=max(LEAST_QUERIES, triton.next_power_of_2(group)),
        BLOCK=BLOCK[cache.kind],
    )
    output = torch.empty_like(query)
    combine_kernel[(num_tokens * num_heads,)](
        partial, partial_max, partial_sum, output, HEAD_DIM=head_dim, SPLITS=NUM_SPLITS
    )
    return output
