"""Preparing a kernel's vector in a worker's own memory: norm, then float32 or int8, as the rows' format wants it."""

from __future__ import annotations

import numba

from hybrid_kernels.native.input_layout import (
    CODE,
    COLUMNS,
    EPS,
    GROUPS,
    INPUT_STRIDE,
    LAYER_NORM,
    NORM_BIAS,
    NORM_KIND,
    NORM_WEIGHT,
    RMS_NORM,
    SCRATCH,
    SCRATCH_STRIDE,
    VALUE_BYTES,
    VECTOR_COLUMNS,
    X,
)
from hybrid_kernels.native.memory_access import get_f32, get_i64, put_f32
from hybrid_kernels.row_codes import FIRST_QUANTIZED
from hybrid_kernels.simd.float_rows import row_dot
from hybrid_kernels.simd.int8_rows import int8_dot, int8_dot_ahead, pair_groups, quantize_vector
from hybrid_kernels.simd.vectors import copy_values, fill_zeros, layer_norm, rms_norm

LEAST_AHEAD = 2304  # bytes: what a core reads in some two of the memory's latencies


@numba.njit(error_model="numpy")
def scratch_of(arguments: int, worker: int) -> int:
    """Address of the worker's memory: the vector as float32, then its levels, scales and offsets."""
    return get_i64(arguments, SCRATCH) + worker * get_i64(arguments, SCRATCH_STRIDE)


@numba.njit(error_model="numpy")
def scratch_behind_vector(arguments: int, worker: int) -> int:
    """Address of ROW_SCRATCH_BYTES more."""
    return scratch_of(arguments, worker) + get_i64(arguments, VECTOR_COLUMNS) * 6


@numba.njit(error_model="numpy")
def prepare_input(arguments: int, worker: int, input_idx: int) -> None:
    """Norm and quantise the vector with that number."""
    x = get_i64(arguments, X) + input_idx * get_i64(arguments, INPUT_STRIDE)
    vector, columns, width = (
        scratch_of(arguments, worker),
        get_i64(arguments, COLUMNS),
        get_i64(arguments, VECTOR_COLUMNS),
    )
    kind, eps = get_i64(arguments, NORM_KIND), get_f32(arguments, 2 * EPS)
    if kind == RMS_NORM:
        rms_norm(x, get_i64(arguments, NORM_WEIGHT), vector, columns, eps)
    elif kind == LAYER_NORM:
        layer_norm(x, get_i64(arguments, NORM_WEIGHT), get_i64(arguments, NORM_BIAS), vector, columns, eps)
    else:
        copy_values(x, vector, columns)
    fill_zeros(vector, columns, width)
    code = get_i64(arguments, CODE)
    if code >= FIRST_QUANTIZED:
        levels = vector + 4 * width
        groups = get_i64(arguments, GROUPS)
        quantize_vector(code, vector, levels, levels + width, levels + width + 4 * groups, groups)
        pair_groups(code, levels, groups)


@numba.njit(error_model="numpy")
def row_times_input(arguments: int, worker: int, row: int, ahead: int) -> float:
    """Dot product of a row with the prepared vector. ahead: what will be read soon, for prefetching."""
    code, groups = get_i64(arguments, CODE), get_i64(arguments, GROUPS)
    vector, scales = scratch_of(arguments, worker), row + get_i64(arguments, VALUE_BYTES)
    if code < FIRST_QUANTIZED:
        return row_dot(code, row, scales, vector, groups)
    width = get_i64(arguments, VECTOR_COLUMNS)
    levels = vector + 4 * width
    return int8_dot(code, row, scales, levels, levels + width, levels + width + 4 * groups, groups, ahead)


@numba.njit(error_model="numpy")
def row_times_input_ahead(arguments: int, worker: int, row: int, ahead: int, further: int) -> float:
    """The same, with two rows that will be read soon."""
    code, groups = get_i64(arguments, CODE), get_i64(arguments, GROUPS)
    vector, scales = scratch_of(arguments, worker), row + get_i64(arguments, VALUE_BYTES)
    if code < FIRST_QUANTIZED:
        return row_dot(code, row, scales, vector, groups)
    width = get_i64(arguments, VECTOR_COLUMNS)
    levels = vector + 4 * width
    x_scales = levels + width
    return int8_dot_ahead(code, row, scales, levels, x_scales, x_scales + 4 * groups, groups, ahead, further)


@numba.njit(error_model="numpy")
def bytes_ahead(stride: int) -> int:
    """How far rows_times_input prefetches: one row of stride bytes, which was fastest, or several short ones."""
    return max(stride, LEAST_AHEAD)


@numba.njit(error_model="numpy")
def rows_times_input(
    arguments: int, worker: int, row: int, stride: int, num_rows: int, output: int, end: int, following: int
) -> None:
    """Dot products of rows, stride bytes apart, with the prepared vector: float32 [num_rows] at output.

    What lies bytes_ahead further is prefetched: up to end, and then from following on.
    """
    distance = bytes_ahead(stride)
    for idx in range(num_rows):
        place = row + idx * stride
        ahead = place + distance
        if ahead >= end:
            ahead += following - end
        put_f32(output, idx, row_times_input(arguments, worker, place, ahead))
