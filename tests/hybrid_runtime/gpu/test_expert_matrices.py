"""Matrices of a layer's experts on the GPU: without a second copy where they lie well."""

import pytest
import torch

from hybrid_kernels.packed_matrix import PackedMatrix
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.gpu.layer import expert_matrices

CPU = torch.device("cpu")
COLUMNS, NUM_ROWS = 70, 5
FORMAT = RowFormat("q8", 32)
WIDTH = FORMAT.row_bytes(COLUMNS)


def block(num_bytes):
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def matrices_at(memory, starts):
    size = NUM_ROWS * WIDTH
    return [PackedMatrix(memory[at : at + size].view(NUM_ROWS, WIDTH), COLUMNS, FORMAT) for at in starts]


@pytest.mark.parametrize("starts", [[0], [64, 1064, 2064], [0, NUM_ROWS * WIDTH, 2 * NUM_ROWS * WIDTH]])
def test_those_that_lie_equally_far_apart_stay(starts):
    memory = block(8192)
    some = matrices_at(memory, starts)
    found = expert_matrices(some, CPU)
    assert found.rows.data_ptr() == some[0].rows.data_ptr()
    for idx, matrix in enumerate(some):
        assert torch.equal(found.of(idx).rows, matrix.rows)
        assert found.of(idx).rows.data_ptr() == matrix.rows.data_ptr()


@pytest.mark.parametrize("starts", [[0, 1064, 2064], [2064, 1064, 64]])
def test_others_are_copied_without_padding(starts):
    some = matrices_at(block(8192), starts)
    found = expert_matrices(some, CPU)
    close = FORMAT.close_row_bytes(COLUMNS)
    assert found.rows.stride() == (NUM_ROWS * close, close, 1)
    for idx, matrix in enumerate(some):
        assert torch.equal(found.of(idx).rows[:, :close], matrix.rows[:, :close])


def test_those_of_different_memory_are_copied():
    some = [*matrices_at(block(4096), [0]), *matrices_at(block(4096), [1024])]
    found = expert_matrices(some, CPU)
    close = FORMAT.close_row_bytes(COLUMNS)
    assert all(torch.equal(found.of(idx).rows[:, :close], each.rows[:, :close]) for idx, each in enumerate(some))
