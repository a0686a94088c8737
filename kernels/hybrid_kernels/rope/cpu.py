"""The beginning of a token, compiled: its embedding's row as float32, and the angles of its rotary position."""

from __future__ import annotations

import math

import numpy as np

from hybrid_kernels.native.memory_access import get_f32, get_i64, put_f32
from hybrid_kernels.rope.layout import (
    COSINES,
    EMBED_CODE,
    EMBED_GROUPS,
    EMBED_ROWS,
    EMBED_STRIDE,
    EMBED_VALUE_BYTES,
    HALF_DIM,
    HIDDEN_SIZE,
    INVERSE_FREQUENCIES,
    LEARNED_CODE,
    LEARNED_GROUPS,
    LEARNED_OFFSET,
    LEARNED_ROWS,
    LEARNED_STRIDE,
    LEARNED_VALUE_BYTES,
    MAGNITUDE,
    SINES,
    SPARE,
    TOKEN,
    X,
)
from hybrid_kernels.simd.float_rows import row_unpack
from hybrid_kernels.simd.vectors import add_values


def begin_token(arguments: int, worker: int, counter: int) -> None:
    """Worker 0 alone: some microseconds."""
    if worker != 0:
        return
    token, position = get_i64(get_i64(arguments, TOKEN), 0), get_i64(get_i64(arguments, TOKEN), 1)
    x = get_i64(arguments, X)
    row = get_i64(arguments, EMBED_ROWS) + token * get_i64(arguments, EMBED_STRIDE)
    scales = row + get_i64(arguments, EMBED_VALUE_BYTES)
    row_unpack(get_i64(arguments, EMBED_CODE), row, scales, x, get_i64(arguments, EMBED_GROUPS))
    if get_i64(arguments, LEARNED_ROWS) != 0:
        place = position + get_i64(arguments, LEARNED_OFFSET)
        row = get_i64(arguments, LEARNED_ROWS) + place * get_i64(arguments, LEARNED_STRIDE)
        scales, spare = row + get_i64(arguments, LEARNED_VALUE_BYTES), get_i64(arguments, SPARE)
        row_unpack(get_i64(arguments, LEARNED_CODE), row, scales, spare, get_i64(arguments, LEARNED_GROUPS))
        add_values(spare, x, get_i64(arguments, HIDDEN_SIZE))
    frequencies, magnitude = get_i64(arguments, INVERSE_FREQUENCIES), get_f32(arguments, 2 * MAGNITUDE)
    for idx in range(get_i64(arguments, HALF_DIM)):
        angle = np.float32(position) * get_f32(frequencies, idx)
        put_f32(get_i64(arguments, COSINES), idx, np.float32(math.cos(angle)) * magnitude)
        put_f32(get_i64(arguments, SINES), idx, np.float32(math.sin(angle)) * magnitude)
