"""Expert routing of one token, compiled. Chosen experts are in the order of their numbers, as their sum is taken."""

from __future__ import annotations

import math

import numba
import numpy as np

from hybrid_kernels.native.memory_access import get_f32, get_i64, put_f32, put_i64
from hybrid_kernels.routing.layout import (
    CHOSEN,
    LOGITS,
    NORMALIZE,
    NUM_CHOSEN,
    NUM_EXPERTS,
    SCORE,
    SOFTMAX,
    TOPK_SIGMOID,
    WEIGHTS,
)


def route(arguments: int, worker: int, counter: int) -> None:
    """Worker 0 alone: the experts are few."""
    if worker != 0:
        return
    logits, chosen = get_i64(arguments, LOGITS), get_i64(arguments, CHOSEN)
    num_experts, num_chosen = get_i64(arguments, NUM_EXPERTS), get_i64(arguments, NUM_CHOSEN)
    for slot in range(num_chosen):
        best = -1
        for expert in range(num_experts):
            if not _is_among(chosen, slot, expert) and (best < 0 or get_f32(logits, expert) > get_f32(logits, best)):
                best = expert
        put_i64(chosen, slot, best)
    _sort(chosen, num_chosen)
    _weigh(arguments, logits, num_experts, chosen, num_chosen)


@numba.njit(error_model="numpy")
def _weigh(arguments: int, logits: int, num_experts: int, chosen: int, num_chosen: int) -> None:
    """Write the weights of the chosen experts."""
    weights, score = get_i64(arguments, WEIGHTS), get_i64(arguments, SCORE)
    highest = get_f32(logits, 0)
    for expert in range(num_experts):
        highest = max(highest, get_f32(logits, expert))
    everything, among_chosen, total = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for expert in range(num_experts):
        everything += np.float32(math.exp(get_f32(logits, expert) - highest))
    for slot in range(num_chosen):
        among_chosen += np.float32(math.exp(get_f32(logits, get_i64(chosen, slot)) - highest))
    for slot in range(num_chosen):
        logit = get_f32(logits, get_i64(chosen, slot))
        if score == TOPK_SIGMOID:
            weight = np.float32(1.0) / (np.float32(1.0) + np.float32(math.exp(-logit)))
        else:
            over = everything if score == SOFTMAX else among_chosen
            weight = np.float32(math.exp(logit - highest)) / over
        put_f32(weights, slot, weight)
        total += weight
    if get_i64(arguments, NORMALIZE) != 0:
        for slot in range(num_chosen):
            put_f32(weights, slot, get_f32(weights, slot) / total)


@numba.njit(error_model="numpy")
def _is_among(chosen: int, count: int, expert: int) -> bool:
    found = False
    for slot in range(count):
        found |= get_i64(chosen, slot) == expert
    return found


@numba.njit(error_model="numpy")
def _sort(numbers: int, count: int) -> None:
    for last in range(1, count):
        number, place = get_i64(numbers, last), last
        while place > 0 and get_i64(numbers, place - 1) > number:
            put_i64(numbers, place, get_i64(numbers, place - 1))
            place -= 1
        put_i64(numbers, place, number)
