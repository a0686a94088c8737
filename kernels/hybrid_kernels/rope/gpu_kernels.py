"""The GPU's kernel behind gpu.py."""

from __future__ import annotations

import triton
import triton.language as tl

ROUNDER = tl.constexpr(
    12582912.0
)  # 1.5 * 2**23: adding and subtracting it leaves the nearest whole number, ties to even


@triton.jit
def rotate_and_append_kernel(
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
    position_stride,
    scale_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATES: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
):
    """queries: float32 [T, heads, D], rotated in place; keys, values: float32 [T, kv_heads, D], which go to the cache.

    A program has a token's head: first the queries', then the keys', then the values'. positions: int32 [T];
    cosines, sines: float32 [all positions, D / 2]; strides: of a position, in the caches' own types.
    """
    token, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + token).to(tl.int64)
    half = tl.arange(0, HEAD_DIM // 2)
    is_query, is_key = head < NUM_HEADS, (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    if is_query:
        source = queries + (token * NUM_HEADS + head).to(tl.int64) * HEAD_DIM
    elif is_key:
        source = keys + (token * NUM_KV_HEADS + head - NUM_HEADS).to(tl.int64) * HEAD_DIM
    else:
        source = values + (token * NUM_KV_HEADS + head - NUM_HEADS - NUM_KV_HEADS).to(tl.int64) * HEAD_DIM
    first, second = tl.load(source + half), tl.load(source + HEAD_DIM // 2 + half)
    if ROTATES and head < NUM_HEADS + NUM_KV_HEADS:
        cosine = tl.load(cosines + position * (HEAD_DIM // 2) + half)
        sine = tl.load(sines + position * (HEAD_DIM // 2) + half)
        rotated = first * cosine - second * sine
        second = second * cosine + first * sine
        first = rotated
    if is_query:
        tl.store(source + half, first)
        tl.store(source + HEAD_DIM // 2 + half, second)
    else:
        if is_key:
            kv_head = head - NUM_HEADS
            cache = key_cache
            scales = key_scales
        else:
            kv_head = head - NUM_HEADS - NUM_KV_HEADS
            cache = value_cache
            scales = value_scales
        target = cache + position * position_stride + kv_head * HEAD_DIM
        if KIND == "q8":
            scale_target = scales + position * scale_stride + kv_head * (HEAD_DIM // GROUP)
            store_levels(target, scale_target, first, 0, HEAD_DIM // 2, GROUP)
            store_levels(target, scale_target, second, HEAD_DIM // 2, HEAD_DIM // 2, GROUP)
        else:
            tl.store(target + half, first)
            tl.store(target + HEAD_DIM // 2 + half, second)


@triton.jit
def store_levels(target, scale_target, vector, start, WIDTH: tl.constexpr, GROUP: tl.constexpr):
    """vector: float32 [WIDTH], whole groups -> int8 levels and a float16 scale a group, as row_format's q8."""
    groups = tl.reshape(vector, (WIDTH // GROUP, GROUP))
    scale = (tl.max(tl.abs(groups), axis=1) / 127.0).to(tl.float16)
    wide = scale.to(tl.float32)[:, None]
    level = tl.where(wide == 0, 0.0, groups / tl.where(wide == 0, 1.0, wide))
    level = tl.minimum(tl.maximum((level + ROUNDER) - ROUNDER, -127.0), 127.0)
    group = tl.arange(0, WIDTH // GROUP)
    place = start + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(target + place, level.to(tl.int8))
    tl.store(scale_target + start // GROUP + group, scale)
