"""Packed matrices and bundles: views without copies, and bytes that cannot be rows are refused."""

import pytest
import torch

from hybrid_kernels.packed_matrix import Bundles, PackedMatrix
from hybrid_kernels.quantization.reference import dequantize_rows, quantize_rows
from hybrid_kernels.quantization.row_format import GROUP_SIZES, WORD_BYTES, RowFormat

FORMATS = [
    RowFormat("f32"),
    RowFormat("bf16"),
    *(RowFormat(kind, group) for kind in ("q8", "q4") for group in GROUP_SIZES),
]
Q4 = RowFormat("q4", 32)


@pytest.mark.parametrize("row_format", FORMATS, ids=str)
@pytest.mark.parametrize("columns", [1, 32, 96, 130])
def test_rows_close_together_are_the_same_rows_in_less_memory(random_matrix, row_format, columns):
    matrix = random_matrix(9, columns, row_format)
    close = matrix.close_together()
    assert close.num_bytes == 9 * row_format.close_row_bytes(columns) <= matrix.num_bytes == matrix.rows.numel()
    assert close.num_bytes - 9 * WORD_BYTES < 9 * (row_format.value_bytes(columns) + row_format.scale_bytes(columns))
    for start in (0, 4):
        ours, theirs = (each.slice_rows(start, 9) for each in (close, matrix))
        assert torch.equal(
            dequantize_rows(ours.rows, columns, row_format), dequantize_rows(theirs.rows, columns, row_format)
        )
    after_last = row_format.row_bytes(columns) - row_format.close_row_bytes(columns)
    assert close.rows.untyped_storage().nbytes() == close.num_bytes + after_last


def test_slice_rows_is_a_view_of_those_rows(random_matrix):
    matrix = random_matrix(7, 70, Q4)
    part = matrix.slice_rows(2, 5)
    assert part.num_rows == 3
    assert torch.equal(part.rows, matrix.rows[2:5])
    assert part.rows.data_ptr() == matrix.rows.data_ptr() + 2 * Q4.row_bytes(70)


def test_an_empty_slice_has_no_rows(random_matrix):
    assert random_matrix(7, 70, Q4).slice_rows(7, 7).num_rows == 0


@pytest.mark.parametrize("row_format", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("num_neurons", "hidden_size"), [(1, 1), (5, 33), (9, 128)], ids=["I1-H1", "I5-H33", "I9-H128"]
)
def test_bundle_parts_are_gate_up_and_down_in_this_order(row_format, num_neurons, hidden_size):
    parts = [quantize_rows(torch.randn(num_neurons, hidden_size), row_format) for _ in range(3)]
    bundles = Bundles(torch.stack(parts, dim=1), hidden_size, row_format)
    assert bundles.num_neurons == num_neurons
    assert bundles.has_gate
    for part, matrix in zip(parts, (bundles.gate_proj, bundles.up_proj, bundles.down_proj_t), strict=True):
        assert matrix.rows.untyped_storage().data_ptr() == bundles.data.untyped_storage().data_ptr()
        assert torch.equal(
            dequantize_rows(matrix.rows, hidden_size, row_format), dequantize_rows(part, hidden_size, row_format)
        )


def test_bundles_of_two_parts_have_no_gate(random_bundles):
    bundles = random_bundles(4, 64, Q4, gated=False)
    assert not bundles.has_gate
    assert torch.equal(bundles.up_proj.rows, bundles.data[:, 0])
    assert torch.equal(bundles.down_proj_t.rows, bundles.data[:, 1])
    with pytest.raises(AssertionError):
        _ = bundles.gate_proj


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("neurons", [torch.tensor([4, 0, 2]), torch.tensor([], dtype=torch.int64), slice(1, 4)])
def test_take_keeps_the_neurons_biases_and_drops_the_outputs(random_bundles, neurons, gated):
    bundles = random_bundles(5, 64, Q4, gated=gated, biases=True)
    taken = bundles.take(neurons)
    assert torch.equal(taken.data, bundles.data[neurons])
    assert torch.equal(taken.up_bias, bundles.up_bias[neurons])
    assert taken.gate_bias is None if not gated else torch.equal(taken.gate_bias, bundles.gate_bias[neurons])
    assert taken.down_bias is None  # the sum over all neurons adds it once


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(3, 64, dtype=torch.int8),
        torch.zeros(3, 63, dtype=torch.uint8),
        torch.zeros(3, 128, dtype=torch.uint8),
        torch.zeros(64, dtype=torch.uint8),
        torch.zeros(1, 3, 64, dtype=torch.uint8),
    ],
    ids=["int8", "short", "long", "one dimension", "three dimensions"],
)
def test_bytes_that_cannot_be_rows_are_refused(rows):
    with pytest.raises(ValueError, match=r"rows are .* expected uint8 \[N, 64\] for 70 columns of q4 group 32"):
        PackedMatrix(rows, 70, Q4)


@pytest.mark.parametrize(
    "data",
    [
        torch.zeros(4, 3, 64, dtype=torch.int8),
        torch.zeros(4, 3, 65, dtype=torch.uint8),
        torch.zeros(4, 1, 64, dtype=torch.uint8),
        torch.zeros(4, 4, 64, dtype=torch.uint8),
        torch.zeros(4, 64, dtype=torch.uint8),
    ],
    ids=["int8", "long rows", "one part", "four parts", "two dimensions"],
)
def test_bytes_that_cannot_be_bundles_are_refused(data):
    with pytest.raises(ValueError, match=r"bundles are .* expected uint8 \[I, 2 or 3, 64\] for hidden_size 70 in q4"):
        Bundles(data, 70, Q4)


@pytest.mark.parametrize(("name", "width"), [("gate_bias", 3), ("up_bias", 5), ("down_bias", 4)])
def test_a_bias_of_another_width_is_refused(name, width):
    with pytest.raises(
        ValueError, match=rf"{name} has shape \({width},\), expected \({70 if 'down' in name else 4},\)"
    ):
        Bundles(torch.zeros(4, 3, 64, dtype=torch.uint8), 70, Q4, **{name: torch.zeros(width)})
