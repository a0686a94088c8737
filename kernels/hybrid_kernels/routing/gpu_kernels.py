"""The GPU's kernel behind gpu.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def route_kernel(
    logits,
    experts,
    weights,
    NUM_EXPERTS: tl.constexpr,
    CHOSEN: tl.constexpr,
    SCORE: tl.constexpr,
    NORMALIZES: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """logits: float32 [T, E]; experts: int32 [T, CHOSEN], weights: float32 [T, CHOSEN], largest first; ties: the first.

    A program a token: the largest is taken CHOSEN times, which for eight or sixty experts is quicker than sorting.
    """
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    mask = expert < NUM_EXPERTS
    value = tl.load(logits + token * NUM_EXPERTS + expert, mask, float("-inf"))
    largest = tl.max(value, axis=0)
    all_sum = tl.sum(tl.exp(value - largest), axis=0)
    place = tl.arange(0, SLOTS)
    chosen, kept = tl.zeros((SLOTS,), tl.int32), tl.zeros((SLOTS,), tl.float32)
    for slot in tl.static_range(CHOSEN):
        best = tl.max(value, axis=0)
        which = tl.min(tl.where(value == best, expert, BLOCK), axis=0)
        if SCORE == "softmax":
            weight = tl.exp(best - largest) / all_sum
        elif SCORE == "topk_sigmoid":
            weight = 1.0 / (1.0 + tl.exp(-best))
        else:
            weight = tl.exp(best - largest)
        chosen = tl.where(place == slot, which, chosen)
        kept = tl.where(place == slot, weight, kept)
        value = tl.where(expert == which, float("-inf"), value)
    if NORMALIZES or SCORE == "topk_softmax":
        kept = kept / tl.sum(kept, axis=0)
    tl.store(experts + token * CHOSEN + place, chosen, place < CHOSEN)
    tl.store(weights + token * CHOSEN + place, kept, place < CHOSEN)
