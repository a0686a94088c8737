"""The reference's product for one vector, compiled: packed rows meet it in registers.

Bound by the bytes of the rows. Workers draw blocks of rows; every output is one worker's, so results do not depend on
how many there are.
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
from hybrid_kernels.native.inputs import prepare_input, rows_times_input, scratch_behind_vector
from hybrid_kernels.native.memory_access import atomic_add, get_f32, get_i64, put_f32, put_i32, put_i64
from hybrid_kernels.simd.vectors import add_values


def project(arguments: int, worker: int, counter: int) -> None:
    """Rows of one or several matrices of one format times a vector, which each worker norms and quantises itself."""
    num_matrices, rows_per_task = get_i64(arguments, NUM_MATRICES), get_i64(arguments, ROWS_PER_TASK)
    prepared = -1
    matrix_idx, tasks_before = 0, 0
    matrix = _matrix(arguments, 0)
    tasks = (get_i64(matrix, NUM_ROWS) + rows_per_task - 1) // rows_per_task
    while True:
        task = atomic_add(counter, 1)
        while task - tasks_before >= tasks:
            tasks_before += tasks
            matrix_idx += 1
            if matrix_idx == num_matrices:
                return
            matrix = _matrix(arguments, matrix_idx)
            tasks = (get_i64(matrix, NUM_ROWS) + rows_per_task - 1) // rows_per_task
        if matrix_idx != prepared:
            if prepared < 0 or get_i64(arguments, INPUT_STRIDE) != 0:
                _copy_input(arguments, worker, matrix)
                prepare_input(_input_of(arguments, worker), worker, matrix_idx)
            prepared = matrix_idx
        first = (task - tasks_before) * rows_per_task
        last = min(first + rows_per_task, get_i64(matrix, NUM_ROWS))
        output = get_i64(arguments, OUTPUTS) + matrix_idx * OUTPUT_WORDS * 8
        if get_i64(arguments, OUTPUT_KIND) == SELECT:
            _select_rows(arguments, worker, matrix, output, first, last)
        else:
            _store_rows(arguments, worker, matrix, output, first, last)


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
def _products(arguments: int, worker: int, matrix: int, first: int, last: int, output: int) -> None:
    """Products of the rows first ... last - 1, biases added."""
    stride, bias = get_i64(matrix, STRIDE), get_i64(matrix, BIAS)
    row = get_i64(matrix, ROWS) + first * stride
    rows_times_input(_input_of(arguments, worker), worker, row, stride, last - first, output)
    if bias != 0:
        add_values(bias + 4 * first, output, last - first)


@numba.njit(error_model="numpy")
def _store_rows(arguments: int, worker: int, matrix: int, output: int, first: int, last: int) -> None:
    residual, values = get_i64(output, RESIDUAL), get_i64(output, OUTPUT) + 4 * first
    _products(arguments, worker, matrix, first, last, values)
    if residual != 0:
        add_values(residual + 4 * first, values, last - first)
    if get_i64(arguments, OUTPUT_KIND) == RELU:
        for idx in range(last - first):
            if get_f32(values, idx) < np.float32(0.0):
                put_f32(values, idx, np.float32(0.0))


@numba.njit(error_model="numpy")
def _select_rows(arguments: int, worker: int, matrix: int, output: int, first: int, last: int) -> None:
    """A block of SELECT has ROWS_PER_TASK rows, which MOST_SELECTED allows for."""
    threshold, products = get_f32(arguments, 2 * THRESHOLD), scratch_behind_vector(_input_of(arguments, worker), worker)
    _products(arguments, worker, matrix, first, last, products)
    selected, count = get_i64(output, OUTPUT), 0
    for row_idx in range(first, last):
        if get_f32(products, row_idx - first) > threshold:
            put_i32(selected, first + count, row_idx)
            count += 1
    put_i64(get_i64(output, RESIDUAL), first // get_i64(arguments, ROWS_PER_TASK), count)
