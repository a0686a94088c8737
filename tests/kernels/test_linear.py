"""Packed matrix products: the reference against float64 over independently decoded rows, the twin against it."""

import numba
import numpy as np
import pytest
import torch

from hybrid_kernels.linear import cpu, reference
from hybrid_kernels.linear.op import linear
from hybrid_kernels.packed_matrix import Bundles
from hybrid_kernels.quantization.row_format import GROUP_SIZES, RowFormat

FORMATS = [
    RowFormat("f32"),
    RowFormat("bf16"),
    *(RowFormat(kind, group) for kind in ("q8", "q4") for group in GROUP_SIZES),
]
SHAPES = {"T1-K1-N1": (1, 1, 1), "T3-K100-N33": (3, 100, 33), "T2-K257-N7": (2, 257, 7), "T5-K128-N130": (5, 128, 130)}
# One a way through the twin; the blocks are of a few rows.
PATHS = {
    "torch": {"SMALLEST_COMPILED": 1 << 30},
    "dots": {"SMALLEST_COMPILED": 0, "MOST_DOTS": 99},
    "blocks": {"SMALLEST_COMPILED": 0, "MOST_DOTS": -1, "BLOCK_WEIGHTS": 1000},
}

formats = pytest.mark.parametrize("row_format", FORMATS, ids=str)
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
paths = pytest.mark.parametrize("path", PATHS)
biases = pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])


@pytest.fixture
def take_path(monkeypatch):
    def take(path: str) -> None:
        for name, value in PATHS[path].items():
            monkeypatch.setattr(cpu, name, value)

    return take


def rounding_bound(x, dense, bias) -> torch.Tensor:
    """What float32 sums of K terms may be off by, in any order: (K + 2) halves of an ulp of the terms' magnitudes."""
    magnitudes = x.abs().double() @ dense.abs().double().T + (0 if bias is None else bias.abs().double())
    return (dense.shape[1] + 2) * 2.0**-24 * magnitudes


@formats
@shapes
@biases
def test_reference_is_the_product_with_the_decoded_rows(shape, row_format, has_bias, random_matrix, decode_rows):
    num_tokens, columns, num_rows = shape
    weight, x = random_matrix(num_rows, columns, row_format), torch.randn(num_tokens, columns)
    bias = torch.randn(num_rows) if has_bias else None
    dense = torch.from_numpy(decode_rows(weight.rows, columns, row_format))
    expected = x.double() @ dense.T + (0 if bias is None else bias.double())
    found = reference.linear(x, weight, bias)
    assert found.shape == (num_tokens, num_rows)
    # one rounding more for each product scale * level
    assert ((found - expected).abs() <= 2 * rounding_bound(x, dense, bias)).all()


@formats
@shapes
@biases
@paths
def test_cpu_is_the_reference(take_path, path, shape, row_format, has_bias, random_matrix):
    take_path(path)
    num_tokens, columns, num_rows = shape
    weight, x = random_matrix(num_rows, columns, row_format), torch.randn(num_tokens, columns)
    bias = torch.randn(num_rows) if has_bias else None
    dense = reference.dequantize_rows(weight.rows, columns, row_format)
    difference = (cpu.linear(x, weight, bias) - reference.linear(x, weight, bias)).abs()
    assert (difference <= 2 * rounding_bound(x, dense, bias)).all()


@formats
@paths
def test_a_product_does_not_depend_on_the_number_of_threads(take_path, path, row_format, random_matrix):
    take_path(path)
    weight, x = random_matrix(200, 333, row_format), torch.randn(3, 333)
    one = cpu.linear(x, weight)
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    assert torch.equal(cpu.linear(x, weight), one)


@formats
def test_large_enough_matrices_are_compiled(monkeypatch, row_format, random_matrix):
    seen = []
    monkeypatch.setattr(cpu, "SMALLEST_COMPILED", 300)
    for name in ("_dots", "_blocks"):
        monkeypatch.setattr(cpu, name, lambda x, weight, output, name=name: (seen.append(name), output.zero_()))
    for num_rows, num_tokens in ((2, 1), (3, 1), (3, cpu.MOST_DOTS), (3, cpu.MOST_DOTS + 1)):
        cpu.linear(torch.ones(num_tokens, 100), random_matrix(num_rows, 100, row_format))
    assert seen == ([] if row_format.kind == "f32" else ["_dots", "_dots", "_blocks"])


@formats
@pytest.mark.parametrize(("num_tokens", "num_rows"), [(0, 3), (2, 0)], ids=["T0-N3", "T2-N0"])
@paths
def test_nothing_in_gives_nothing_out(take_path, path, num_tokens, num_rows, row_format, random_matrix):
    take_path(path)
    weight = random_matrix(3, 100, row_format).slice_rows(0, num_rows)
    for twin in (reference, cpu):
        assert twin.linear(torch.randn(num_tokens, 100), weight).shape == (num_tokens, num_rows)


@formats
@paths
def test_rows_of_bundles_are_read_across_their_stride(take_path, path, row_format, random_bundles, decode_rows):
    take_path(path)
    bundles: Bundles = random_bundles(9, 70, row_format, gated=True)
    x = torch.randn(2, 70)
    for idx, matrix in enumerate((bundles.gate_proj, bundles.up_proj, bundles.down_proj_t)):
        dense = torch.from_numpy(decode_rows(bundles.data[:, idx], 70, row_format))
        difference = (linear(x, matrix) - x.double() @ dense.T).abs()
        assert (difference <= 2 * rounding_bound(x, dense, None)).all()


@paths
def test_the_last_bits_of_a_row_are_not_columns(take_path, path, random_matrix):
    """Padding columns and the bytes after the scales do not reach the result, whatever they hold."""
    take_path(path)
    row_format = RowFormat("q8", 32)
    weight, x = random_matrix(3, 33, row_format), torch.randn(2, 33)
    before = linear(x, weight)
    weight.rows[:, 33:64] = 77
    weight.rows[:, 64 + 4 :] = 255
    assert torch.equal(linear(x, weight), before)


@pytest.mark.parametrize(
    "x",
    [torch.ones(2, 99), torch.ones(100), torch.ones(2, 100, dtype=torch.float64), torch.ones(1, 2, 100)],
    ids=["narrow", "one dimension", "float64", "three dimensions"],
)
def test_an_x_that_does_not_fit_is_refused(x, random_matrix):
    with pytest.raises(ValueError, match=r"x is torch\..*, expected float32 \[T, 100\]"):
        linear(x, random_matrix(3, 100, RowFormat("f32")))


@pytest.mark.parametrize("shape", [(2,), (1, 3), ()])
def test_a_bias_that_does_not_fit_is_refused(shape, random_matrix):
    with pytest.raises(ValueError, match=r"bias has shape \(.*\), expected \(3,\)"):
        linear(torch.ones(1, 100), random_matrix(3, 100, RowFormat("f32")), torch.ones(shape))


def test_the_bound_of_these_tests_is_no_carte_blanche(random_matrix, decode_rows):
    """One level of one weight off is seen."""
    weight, x = random_matrix(3, 100, RowFormat("q4", 32)), torch.ones(1, 100)
    dense = torch.from_numpy(decode_rows(weight.rows, 100, weight.row_format))
    weight.rows[0, 0] ^= 1
    difference = (linear(x, weight) - x.double() @ dense.T).abs()
    assert np.array_equal((difference > 2 * rounding_bound(x, dense, None)).numpy(), [[True, False, False]])
