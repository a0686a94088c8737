"""GPU kernels in Triton's interpreter, against the references. test_interpreted.py runs this file in its own process.

The interpreter has no bf16, takes milliseconds for a program, and stands in for no compiler: see test_compiled.py.
"""

import pytest
import torch

from hybrid_kernels.activation import Activation
from hybrid_kernels.linear import gpu as linear_gpu
from hybrid_kernels.linear import reference as linear_reference
from hybrid_kernels.linear.gpu import MOST_VECTORS, Tiling, linear
from hybrid_kernels.packed_matrix import Bundles, PackedMatrix
from hybrid_kernels.quantization.reference import quantize_rows
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.sparse_ffn import gpu as ffn_gpu
from hybrid_kernels.sparse_ffn import reference as ffn_reference
from hybrid_kernels.sparse_ffn.gpu import MOST_TOKENS, sparse_ffn

FORMATS = [RowFormat("q4", group) for group in (32, 64, 128)] + [
    RowFormat("q8", 32), RowFormat("q8", 128), RowFormat("bf16"), RowFormat("f32")
]  # fmt: skip
# Vectors are rounded to float16 for quantised rows, weights to float16 times a level: 2**-11 each.
TOLERANCE = {"q4": 2e-3, "q8": 2e-3, "bf16": 1e-5, "f32": 1e-5}
KINDS = [Activation(kind) for kind in ("drelu", "relu_glu", "relu2_glu", "relu", "relu2")] + [
    Activation("fatrelu", 0.5)
]


def matrix(num_rows, columns, row_format, seed=0):
    weights = torch.randn(num_rows, columns, generator=torch.Generator().manual_seed(seed))
    return PackedMatrix(quantize_rows(weights, row_format), columns, row_format)


def vectors(count, width, seed=1):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def assert_close(found, expected, row_format):
    size = expected.square().mean().sqrt()
    assert float((found - expected).abs().max()) <= TOLERANCE[row_format.kind] * float(size) * 4
    assert float((found - expected).square().mean().sqrt()) <= TOLERANCE[row_format.kind] * float(size)


@pytest.mark.parametrize("row_format", FORMATS, ids=str)
@pytest.mark.parametrize(("num_rows", "columns", "count"), [(40, 168, 3), (1, 32, 1), (33, 300, 17)])
def test_linear(row_format, num_rows, columns, count):
    weight, x = matrix(num_rows, columns, row_format), vectors(count, columns)
    bias = vectors(1, num_rows, seed=2)[0]
    found = linear(x, weight, bias)
    assert_close(found, linear_reference.linear(x, weight, bias), row_format)
    assert torch.equal(found, linear(x, weight, bias))


@pytest.mark.parametrize("row_format", FORMATS[:4], ids=str)
@pytest.mark.parametrize("tiling", [Tiling(16, 128), Tiling(32, 512), Tiling(64, 256)], ids=str)
def test_every_tiling_gives_the_same(row_format, tiling):
    weight, x = matrix(70, 192, row_format), vectors(2, 192)
    assert_close(linear(x, weight, tiling=tiling), linear_reference.linear(x, weight), row_format)


def test_each_vector_is_its_own():
    """What stands beside a vector in the tensor core's operand changes nothing of its product."""
    weight, x = matrix(20, 64, RowFormat("q4", 32)), vectors(4, 64)
    together = linear(x, weight)
    for idx in range(4):
        assert torch.equal(linear(x[idx : idx + 1].contiguous(), weight)[0], together[idx])


def test_wrong_arguments_are_refused():
    weight = matrix(4, 64, RowFormat("q4", 32))
    for x, message in (
        (vectors(1, 32), r"expected contiguous float32 \[T, 64\]"),
        (vectors(1, 64).half(), "float16"),
        (vectors(MOST_VECTORS + 1, 64), "at most 64"),
    ):
        with pytest.raises(ValueError, match=message):
            linear(x, weight)
    assert linear(vectors(0, 64), weight).shape == (0, 4)


def bundles_of(num_neurons, hidden_size, row_format, activation, *, has_bias=False):
    parts = 3 if activation.is_gated else 2
    rows = [matrix(num_neurons, hidden_size, row_format, seed).rows for seed in range(parts)]
    biases = {}
    if has_bias:
        biases = {"up_bias": vectors(1, num_neurons, 7)[0], "down_bias": vectors(1, hidden_size, 8)[0]}
        biases |= {"gate_bias": vectors(1, num_neurons, 9)[0]} if activation.is_gated else {}
    return Bundles(torch.stack(rows, 1), hidden_size, row_format, **biases)


def selection(count, num_neurons, share, seed=3):
    return torch.rand(count, num_neurons, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("row_format", FORMATS, ids=str)
@pytest.mark.parametrize(("num_neurons", "hidden_size", "count", "share"), [(90, 168, 3, 0.3), (70, 288, 1, 0.8)])
def test_sparse_ffn(row_format, num_neurons, hidden_size, count, share):
    activation = Activation("drelu")
    bundles = bundles_of(num_neurons, hidden_size, row_format, activation)
    x, selected = vectors(count, hidden_size), selection(count, num_neurons, share)
    found = sparse_ffn(x, bundles, activation, selected)
    assert_close(found, ffn_reference.sparse_ffn(x, bundles, activation, selected), row_format)
    assert torch.equal(found, sparse_ffn(x, bundles, activation, selected))


@pytest.mark.parametrize("activation", KINDS, ids=lambda each: each.kind)
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_every_sparse_activation(activation, has_bias):
    row_format = RowFormat("q8", 32)
    bundles = bundles_of(40, 64, row_format, activation, has_bias=has_bias)
    x, selected = vectors(2, 64), selection(2, 40, 0.5)
    expected = ffn_reference.sparse_ffn(x, bundles, activation, selected)
    assert_close(sparse_ffn(x, bundles, activation, selected), expected, row_format)


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["none", "all"])
def test_empty_and_full_lists(share):
    activation, row_format = Activation("relu_glu"), RowFormat("q4", 32)
    bundles = bundles_of(65, 64, row_format, activation)
    x, selected = vectors(2, 64), selection(2, 65, share)
    expected = ffn_reference.sparse_ffn(x, bundles, activation, selected)
    found = sparse_ffn(x, bundles, activation, selected)
    if share:
        assert_close(found, expected, row_format)
    else:
        assert torch.equal(found, torch.zeros(2, 64))


def test_the_cpus_part_and_the_residual_are_added():
    activation, row_format = Activation("drelu"), RowFormat("q8", 32)
    bundles = bundles_of(50, 64, row_format, activation)
    x, selected = vectors(2, 64), selection(2, 50, 0.5)
    cold, residual = vectors(2, 64, 5), vectors(2, 64, 6)
    expected = ffn_reference.sparse_ffn(x, bundles, activation, selected)
    assert_close(
        sparse_ffn(x, bundles, activation, selected, cold=cold, residual=residual),
        expected + cold + residual,
        row_format,
    )


def test_hot_and_cold_neurons_come_to_the_whole():
    """The split that the hybrid makes: some neurons packed on their own, the others elsewhere, sums added."""
    activation, row_format = Activation("drelu"), RowFormat("q4", 32)
    bundles, x, selected = bundles_of(80, 96, row_format, activation), vectors(2, 96), selection(2, 80, 0.4)
    hot = torch.randperm(80, generator=torch.Generator().manual_seed(4))[:30]
    cold = torch.tensor(sorted(set(range(80)) - set(hot.tolist())))
    rest = ffn_reference.sparse_ffn(x, bundles.take(cold), activation, selected[:, cold])
    found = sparse_ffn(x, bundles.take(hot), activation, selected[:, hot], cold=rest)
    assert_close(found, ffn_reference.sparse_ffn(x, bundles, activation, selected), row_format)


@pytest.mark.parametrize("num_neurons", [5, 1024, 1500])
def test_lists_are_ascending_and_complete(num_neurons):
    selected = selection(3, num_neurons, 0.1).to(torch.int8)
    neurons, count = torch.full((num_neurons,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    ffn_gpu.select_kernel[(1,)](selected, neurons, count, num_neurons, 3, BLOCK=1024, TOKENS=16)
    expected = selected.any(0).nonzero().squeeze(1)
    assert count.item() == len(expected)
    assert neurons[: len(expected)].tolist() == expected.tolist()
    assert (neurons[len(expected) :] == -1).all()


def test_products_beyond_float16_survive():
    """Values of neurons are products, and reach what float16 does not hold."""
    activation, row_format = Activation("drelu"), RowFormat("q8", 32)
    bundles = bundles_of(40, 64, row_format, activation)
    x, selected = 300 * vectors(1, 64), torch.ones(1, 40, dtype=torch.bool)
    expected = ffn_reference.sparse_ffn(x, bundles, activation, selected)
    assert float(expected.abs().max()) > 1e6
    assert_close(sparse_ffn(x, bundles, activation, selected), expected, row_format)


def test_what_the_kernels_do_not_do_is_refused():
    bundles = bundles_of(40, 64, RowFormat("q8", 32), Activation("silu_glu"))
    with pytest.raises(ValueError, match="silu_glu leaves no zeros"):
        sparse_ffn(vectors(1, 64), bundles, Activation("silu_glu"), selection(1, 40, 0.5))
    with pytest.raises(ValueError, match="at most 16"):
        sparse_ffn(vectors(MOST_TOKENS + 1, 64), bundles, Activation("drelu"), selection(MOST_TOKENS + 1, 40, 0.5))


def test_rows_apart_are_read_where_they_lie():
    row_format = RowFormat("q4", 32)
    bundles, x = bundles_of(24, 64, row_format, Activation("drelu")), vectors(2, 64)
    assert_close(linear(x, bundles.up_proj), linear_reference.linear(x, bundles.up_proj), row_format)
    values, scales = linear_gpu.row_views(bundles.up_proj)
    assert values.data_ptr() == bundles.up_proj.rows.data_ptr()
    assert scales.data_ptr() == values.data_ptr() + row_format.value_bytes(64)
