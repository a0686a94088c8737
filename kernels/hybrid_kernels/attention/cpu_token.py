"""Grouped-query attention of one token over the cache, compiled; a task is a key-value head with its queries."""

from __future__ import annotations

import math

import numba
import numpy as np

from hybrid_kernels.attention.layout import (
    COSINES,
    F16,
    F32,
    HEAD_DIM,
    KEY_CACHE,
    KV_GROUP,
    KV_KIND,
    KV_VALUE_BYTES,
    NEW_KEYS,
    NEW_VALUES,
    NUM_HEADS,
    NUM_KV_HEADS,
    OUTPUT,
    POSITION_STRIDE,
    QUERY,
    ROTATES,
    SCALE,
    SCRATCH,
    SCRATCH_STRIDE,
    SINES,
    TOKEN,
    VALUE_CACHE,
    WINDOW,
)
from hybrid_kernels.native.memory_access import (
    atomic_add,
    get_f16,
    get_f32,
    get_i8,
    get_i64,
    put_f16,
    put_f32,
    put_i8,
)
from hybrid_kernels.simd.vectors import add_scaled, copy_values, dot, fill_zeros


def attend(arguments: int, worker: int, counter: int) -> None:
    """Attention of every key-value head's group of queries."""
    while True:
        kv_head = atomic_add(counter, 1)
        if kv_head >= get_i64(arguments, NUM_KV_HEADS):
            return
        _attend_group(arguments, worker, kv_head)


@numba.njit(error_model="numpy")
def _attend_group(arguments: int, worker: int, kv_head: int) -> None:
    head_dim, position = get_i64(arguments, HEAD_DIM), get_i64(get_i64(arguments, TOKEN), 1)
    group = get_i64(arguments, NUM_HEADS) // get_i64(arguments, NUM_KV_HEADS)
    queries = get_i64(arguments, QUERY) + kv_head * group * head_dim * 4
    outputs = get_i64(arguments, OUTPUT) + kv_head * group * head_dim * 4
    keys = get_i64(arguments, NEW_KEYS) + kv_head * head_dim * 4
    values = get_i64(arguments, NEW_VALUES) + kv_head * head_dim * 4
    if get_i64(arguments, ROTATES) != 0:
        _rotate(arguments, keys, head_dim // 2)
        for head in range(group):
            _rotate(arguments, queries + head * head_dim * 4, head_dim // 2)
    _append(arguments, KEY_CACHE, kv_head, position, keys)
    _append(arguments, VALUE_CACHE, kv_head, position, values)

    row = get_i64(arguments, SCRATCH) + worker * get_i64(arguments, SCRATCH_STRIDE)
    scores = row + 2 * head_dim * 4
    window, scale = get_i64(arguments, WINDOW), get_f32(arguments, 2 * SCALE)
    start = max(0, position + 1 - window) if window > 0 else 0
    count = position + 1 - start
    for seen in range(count):
        key = _cached(arguments, KEY_CACHE, kv_head, start + seen, row)
        for head in range(group):
            put_f32(scores, head * count + seen, dot(key, queries + head * head_dim * 4, head_dim) * scale)
    for head in range(group):
        _softmax(scores + head * count * 4, count)
        fill_zeros(outputs + head * head_dim * 4, 0, head_dim)
    for seen in range(count):
        value = _cached(arguments, VALUE_CACHE, kv_head, start + seen, row)
        for head in range(group):
            add_scaled(value, outputs + head * head_dim * 4, head_dim, get_f32(scores, head * count + seen))


@numba.njit(error_model="numpy")
def _rotate(arguments: int, x: int, half: int) -> None:
    cosines, sines = get_i64(arguments, COSINES), get_i64(arguments, SINES)
    for idx in range(half):
        first, second = get_f32(x, idx), get_f32(x, half + idx)
        cosine, sine = get_f32(cosines, idx), get_f32(sines, idx)
        put_f32(x, idx, first * cosine - second * sine)
        put_f32(x, half + idx, second * cosine + first * sine)


@numba.njit(error_model="numpy")
def _append(arguments: int, cache: int, kv_head: int, position: int, vector: int) -> None:
    head_dim, kind = get_i64(arguments, HEAD_DIM), get_i64(arguments, KV_KIND)
    row, first = get_i64(arguments, cache) + position * get_i64(arguments, POSITION_STRIDE), kv_head * head_dim
    if kind == F32:
        copy_values(vector, row + 4 * first, head_dim)
    elif kind == F16:
        for idx in range(head_dim):
            put_f16(row + 2 * first, idx, get_f32(vector, idx))
    else:
        scales = row + get_i64(arguments, KV_VALUE_BYTES) + first // KV_GROUP * 2
        for group in range(head_dim // KV_GROUP):
            _quantize_group(vector + group * KV_GROUP * 4, row + first + group * KV_GROUP, scales + 2 * group)


@numba.njit(error_model="numpy")
def _quantize_group(vector: int, levels: int, scale: int) -> None:
    """quantization/reference.py's q8: the largest at 127, the scale rounded to float16 first."""
    largest = np.float32(0.0)
    for idx in range(KV_GROUP):
        largest = max(largest, abs(get_f32(vector, idx)))
    put_f16(scale, 0, largest / np.float32(127.0))
    rounded = get_f16(scale, 0)
    for idx in range(KV_GROUP):
        level = np.rint(get_f32(vector, idx) / rounded) if rounded > 0.0 else np.float32(0.0)
        put_i8(levels, idx, int(min(max(level, np.float32(-127.0)), np.float32(127.0))))


@numba.njit(error_model="numpy")
def _cached(arguments: int, cache: int, kv_head: int, position: int, spare: int) -> int:
    """Address of a cached vector as float32, unpacked into spare where it is not."""
    head_dim, kind = get_i64(arguments, HEAD_DIM), get_i64(arguments, KV_KIND)
    row, first = get_i64(arguments, cache) + position * get_i64(arguments, POSITION_STRIDE), kv_head * head_dim
    if kind == F32:
        return row + 4 * first
    if kind == F16:
        for idx in range(head_dim):
            put_f32(spare, idx, get_f16(row + 2 * first, idx))
        return spare
    scales = row + get_i64(arguments, KV_VALUE_BYTES) + first // KV_GROUP * 2
    for group in range(head_dim // KV_GROUP):
        scale = get_f16(scales, group)
        for idx in range(group * KV_GROUP, (group + 1) * KV_GROUP):
            put_f32(spare, idx, np.float32(get_i8(row + first, idx)) * scale)
    return spare


@numba.njit(error_model="numpy")
def _softmax(scores: int, count: int) -> None:
    highest = get_f32(scores, 0)
    for idx in range(1, count):
        highest = max(highest, get_f32(scores, idx))
    total = np.float32(0.0)
    for idx in range(count):
        weight = np.float32(math.exp(get_f32(scores, idx) - highest))
        put_f32(scores, idx, weight)
        total += weight
    for idx in range(count):
        put_f32(scores, idx, get_f32(scores, idx) / total)
