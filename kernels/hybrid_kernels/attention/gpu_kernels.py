"""The GPU's kernels behind gpu.py: partial attention over a part of the positions, and the parts put together."""

from __future__ import annotations

import triton
import triton.language as tl

LEAST = tl.constexpr(-1e30)  # of scores: smaller than any, and its differences are numbers


@triton.jit
def attend_kernel(
    query,
    keys,
    values,
    key_scales,
    value_scales,
    positions,
    partial,
    partial_max,
    partial_sum,
    position_stride,
    scale_stride,
    window,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program has a token's key-value head with all its queries, and every num_splits-th block of positions.

    query: float32 [T, heads, D]; positions: int32 [T], the tokens' own, which they see; window: tokens seen, 0: all;
    partial: float32 [T, heads, splits, D], not divided yet; partial_max, partial_sum: float32 [T, heads, splits].
    """
    token, kv_head = tl.program_id(0), tl.program_id(1)
    split, num_splits = tl.program_id(2), tl.num_programs(2)
    group: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    position = tl.load(positions + token)
    column = tl.arange(0, HEAD_DIM)
    member = tl.arange(0, QUERIES)
    in_group = member < group
    head = (token * NUM_HEADS + kv_head * group + member).to(tl.int64)
    q = tl.load(query + head[:, None] * HEAD_DIM + column[None, :], in_group[:, None], 0.0) * scale
    first_seen = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)
    PRECISION: tl.constexpr = "tf32x3" if KIND == "f32" else "tf32"  # which holds all of float16's digits
    best = tl.full((QUERIES,), LEAST, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, HEAD_DIM), tl.float32)
    first_block = first_seen // BLOCK
    for block in range(first_block + split, position // BLOCK + 1, num_splits):
        seen = block * BLOCK + tl.arange(0, BLOCK)
        is_seen = (seen >= first_seen) & (seen <= position)
        at = seen.to(tl.int64)[:, None] * position_stride + kv_head * HEAD_DIM + column[None, :]
        k = tl.load(keys + at, is_seen[:, None], 0).to(tl.float32)  # [BLOCK, D]
        v = tl.load(values + at, is_seen[:, None], 0).to(tl.float32)
        if KIND == "q8":
            of_group = kv_head * (HEAD_DIM // GROUP) + column // GROUP
            scale_at = seen.to(tl.int64)[:, None] * scale_stride + of_group[None, :]
            k *= tl.load(key_scales + scale_at, is_seen[:, None], 0.0).to(tl.float32)
            v *= tl.load(value_scales + scale_at, is_seen[:, None], 0.0).to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [QUERIES, BLOCK]
        scores = tl.where(is_seen[None, :], scores, LEAST)
        better = tl.maximum(best, tl.max(scores, axis=1))
        shrink = tl.exp(best - better)
        weights = tl.where(is_seen[None, :], tl.exp(scores - better[:, None]), 0.0)
        total = total * shrink + tl.sum(weights, axis=1)
        mixed = mixed * shrink[:, None] + tl.dot(weights, v, input_precision=PRECISION)
        best = better
    slot = head * num_splits + split
    tl.store(partial + slot[:, None] * HEAD_DIM + column[None, :], mixed, in_group[:, None])
    tl.store(partial_max + slot, best, in_group)
    tl.store(partial_sum + slot, total, in_group)


@triton.jit
def combine_kernel(partial, partial_max, partial_sum, output, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr):
    """output: float32 [T, heads, D]; a program a head. Splits are added in their order."""
    head = tl.program_id(0).to(tl.int64)
    column, split = tl.arange(0, HEAD_DIM), tl.arange(0, SPLITS)
    best = tl.max(tl.load(partial_max + head * SPLITS + split), axis=0)
    mixed = tl.zeros((HEAD_DIM,), tl.float32)
    total = 0.0
    for idx in range(SPLITS):
        shrink = tl.exp(tl.load(partial_max + head * SPLITS + idx) - best)
        mixed += shrink * tl.load(partial + (head * SPLITS + idx) * HEAD_DIM + column)
        total += shrink * tl.load(partial_sum + head * SPLITS + idx)
    tl.store(output + head * HEAD_DIM + column, mixed / total)
