"""The reference's product for one vector, compiled: packed rows meet it in registers.

Bound by the bytes of the rows. Workers draw blocks of rows, each before it has finished the one before, so that it can
prefetch from one into the other; every output is one worker's, so results do not depend on how many there are.
"""

from __future__ import annotations

import numba
import numpy as np

from hybrid_kernels.linear.layout import (
    BIAS,
    CHOSEN,
    MATRICES,
    MATRIX_COLUMNS,
    MATRIX_GROUPS,
    MATRIX_VALUE_BYTES,
    MATRIX_VECTOR_COLUMNS,
    MATRIX_WORDS,
    NUM_MATRICES,
    NUM_ROWS,
    NUM_STATIC,
    OUTPUT,
    OUTPUT_KIND,
    OUTPUT_WORDS,
    OUTPUTS,
    RELU,
    RESIDUAL,
    ROWS,
    ROWS_PER_TASK,
    SELECT,
    STRIDE,
    THRESHOLD,
)
from hybrid_kernels.native.input_layout import (
    COLUMNS,
    GROUPS,
    INPUT_STRIDE,
    INPUT_WORDS,
    SCRATCH,
    SCRATCH_STRIDE,
    VALUE_BYTES,
    VECTOR_COLUMNS,
)
from hybrid_kernels.native.inputs import bytes_ahead, prepare_input, rows_times_input, scratch_behind_vector
from hybrid_kernels.native.memory_access import atomic_add, get_f32, get_i64, put_f32, put_i32, put_i64
from hybrid_kernels.simd.vectors import add_values


def project(arguments: int, worker: int, counter: int) -> None:
    """Rows of one or several matrices of one format times a vector, which each worker norms and quantises itself."""
    num_matrices, num_static = get_i64(arguments, NUM_MATRICES), get_i64(arguments, NUM_STATIC)
    own, prepared = _input_of(arguments, worker), -1
    task = worker if num_static > 0 else atomic_add(counter, 1)
    matrix_idx, first = _place_of(arguments, task)
    while matrix_idx < num_matrices:
        matrix = _matrix(arguments, matrix_idx)
        if matrix_idx != prepared:
            if prepared < 0 or get_i64(arguments, INPUT_STRIDE) != 0:
                _copy_input(arguments, worker, matrix)
                prepare_input(own, worker, matrix_idx)
            prepared = matrix_idx
        rows, stride = get_i64(matrix, ROWS), get_i64(matrix, STRIDE)
        last = min(first + get_i64(arguments, ROWS_PER_TASK), get_i64(matrix, NUM_ROWS))
        end = rows + last * stride
        output = get_i64(arguments, OUTPUTS) + matrix_idx * OUTPUT_WORDS * 8
        products = get_i64(output, OUTPUT) + 4 * first
        if get_i64(arguments, OUTPUT_KIND) == SELECT:  # ROWS_PER_TASK of them, which MOST_SELECTED allows for
            products = scratch_behind_vector(own, worker)
        num_near_end = (bytes_ahead(stride) + stride - 1) // stride  # rows while which the next task's are prefetched
        near_end = max(last - num_near_end, first)
        rows_times_input(own, worker, rows + first * stride, stride, near_end - first, products, end, end)
        task = atomic_add(counter, 1) + num_static
        next_matrix_idx, next_first = _place_of(arguments, task)
        following = rows + near_end * stride  # where nothing follows: what is at hand
        if next_matrix_idx < num_matrices:
            next_matrix = _matrix(arguments, next_matrix_idx)
            following = get_i64(next_matrix, ROWS) + next_first * get_i64(next_matrix, STRIDE)
        near_products = products + 4 * (near_end - first)
        rows_times_input(own, worker, rows + near_end * stride, stride, last - near_end, near_products, end, following)
        if get_i64(matrix, BIAS) != 0:
            add_values(get_i64(matrix, BIAS) + 4 * first, products, last - first)
        if get_i64(arguments, OUTPUT_KIND) == SELECT:
            _select(arguments, products, output, first, last)
        else:
            _finish(arguments, products, output, first, last)
        matrix_idx, first = next_matrix_idx, next_first


@numba.njit(error_model="numpy")
def _place_of(arguments: int, task: int) -> tuple[int, int]:
    """Matrix and first row of a task; beyond the last matrix there is none."""
    num_matrices, rows_per_task = get_i64(arguments, NUM_MATRICES), get_i64(arguments, ROWS_PER_TASK)
    for matrix_idx in range(num_matrices):
        tasks = (get_i64(_matrix(arguments, matrix_idx), NUM_ROWS) + rows_per_task - 1) // rows_per_task
        if task < tasks:
            return matrix_idx, task * rows_per_task
        task -= tasks
    return num_matrices, 0


@numba.njit(error_model="numpy")
def _matrix(arguments: int, matrix_idx: int) -> int:
    """Address of the record of the matrix_idx-th matrix that is wanted."""
    chosen = get_i64(arguments, CHOSEN)
    record = matrix_idx if chosen == 0 else get_i64(chosen, matrix_idx)
    return get_i64(arguments, MATRICES) + record * MATRIX_WORDS * 8


@numba.njit(error_model="numpy")
def _input_of(arguments: int, worker: int) -> int:
    """Address of the worker's own copy of the input's words."""
    return get_i64(arguments, SCRATCH) + (worker + 1) * get_i64(arguments, SCRATCH_STRIDE) - 8 * INPUT_WORDS


@numba.njit(error_model="numpy")
def _copy_input(arguments: int, worker: int, matrix: int) -> None:
    """Copy the input's words, with the matrix's own widths."""
    own = _input_of(arguments, worker)
    for word in range(INPUT_WORDS):
        put_i64(own, word, get_i64(arguments, word))
    put_i64(own, COLUMNS, get_i64(matrix, MATRIX_COLUMNS))
    put_i64(own, VECTOR_COLUMNS, get_i64(matrix, MATRIX_VECTOR_COLUMNS))
    put_i64(own, GROUPS, get_i64(matrix, MATRIX_GROUPS))
    put_i64(own, VALUE_BYTES, get_i64(matrix, MATRIX_VALUE_BYTES))


@numba.njit(error_model="numpy")
def _finish(arguments: int, products: int, output: int, first: int, last: int) -> None:
    residual = get_i64(output, RESIDUAL)
    if residual != 0:
        add_values(residual + 4 * first, products, last - first)
    if get_i64(arguments, OUTPUT_KIND) == RELU:
        for idx in range(last - first):
            if get_f32(products, idx) < np.float32(0.0):
                put_f32(products, idx, np.float32(0.0))


@numba.njit(error_model="numpy")
def _select(arguments: int, products: int, output: int, first: int, last: int) -> None:
    threshold, selected, count = get_f32(arguments, 2 * THRESHOLD), get_i64(output, OUTPUT), 0
    for row_idx in range(first, last):
        if get_f32(products, row_idx - first) > threshold:
            put_i32(selected, first + count, row_idx)
            count += 1
    put_i64(get_i64(output, RESIDUAL), first // get_i64(arguments, ROWS_PER_TASK), count)
