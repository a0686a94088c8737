"""Packed matrix products: the references against float64 over independently decoded rows, the kernels against them."""

import numpy as np
import pytest
import torch

from hybrid_kernels.linear import batch, layout, reference
from hybrid_kernels.linear.op import linear
from hybrid_kernels.packed_matrix import Bundles
from hybrid_kernels.quantization.reference import quantize_rows
from hybrid_kernels.quantization.row_format import GROUP_SIZES, RowFormat

from .kernel_calls import nan_floats, project, project_operation, run, select

QUANTIZED = [RowFormat(kind, group) for kind in ("q8", "q4") for group in GROUP_SIZES]
FORMATS = [RowFormat("f32"), RowFormat("bf16"), *QUANTIZED]
SHAPES = {
    "T1-K1-N1": (1, 1, 1),
    "T3-K100-N33": (3, 100, 33),
    "T2-K257-N7": (2, 257, 7),
    "T5-K128-N130": (5, 128, 130),
    "T33-K333-N9": (33, 333, 9),
    "T2-K256-N70": (2, 256, 70),  # eight groups of 32, which go two at a time, and none besides
    "T2-K600-N7": (2, 600, 7),  # twice eight, and three
}

formats = pytest.mark.parametrize("row_format", FORMATS, ids=str)
quantized = pytest.mark.parametrize("row_format", QUANTIZED, ids=str)
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
biases = pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])


def rounding_bound(x, dense, bias) -> torch.Tensor:
    """What float32 sums of K terms may be off by, in any order: (K + 2) halves of an ulp of the terms' magnitudes."""
    magnitudes = x.abs().double() @ dense.abs().double().T + (0 if bias is None else bias.abs().double())
    return (dense.shape[1] + 2) * 2.0**-24 * magnitudes


def assert_is_rounded_product(found, x, weight, bias=None, residual=0):
    """Kernels and reference round x to the same levels; what is left is the order of float32 sums."""
    x = reference.round_vectors(x, weight.row_format)
    dense = reference.dequantize_rows(weight.rows, weight.columns, weight.row_format)
    difference = (found - (reference.linear(x, weight, bias) + residual)).abs()
    # nibbles are summed without their -8, which is subtracted at the end: terms of 8 steps where w may be nearly 0
    steps = dense.abs().amax(dim=1, keepdim=True) if weight.row_format.kind == "q4" else 0
    bound = 2 * rounding_bound(x, dense.abs() + steps, bias) + 2.0**-22 * torch.as_tensor(residual).abs()
    assert (difference <= bound).all(), (difference / bound).max()


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


@quantized
def test_vectors_are_rounded_to_127ths_of_their_groups_largest(row_format):
    group = row_format.group
    x = torch.randn(3, 3 * group - 5)
    x[1, :group] = 0
    rounded = reference.round_vectors(x, row_format)
    assert rounded.shape == x.shape
    for start in range(0, x.shape[1], group):
        before, after = x[:, start : start + group].double(), rounded[:, start : start + group].double()
        step = before.abs().amax(dim=1, keepdim=True) / 127
        assert ((after - before).abs() <= step * (0.5 + 1e-4)).all()
        levels = after / torch.where(step == 0, 1, step)
        assert ((levels - levels.round()).abs() < 1e-4).all()
    assert (rounded[1, :group] == 0).all()


@pytest.mark.parametrize("row_format", [RowFormat("f32"), RowFormat("bf16")], ids=str)
def test_vectors_for_rows_without_scales_are_left_as_they_are(row_format):
    x = torch.randn(2, 7)
    assert torch.equal(reference.round_vectors(x, row_format), x)


@formats
@shapes
@biases
def test_many_vectors_give_the_rounded_reference(shape, row_format, has_bias, random_matrix, team):
    num_tokens, columns, num_rows = shape
    weight, x = random_matrix(num_rows, columns, row_format), torch.randn(num_tokens, columns)
    bias = torch.randn(num_rows) if has_bias else None
    assert_is_rounded_product(linear(x, weight, bias, team=team), x, weight, bias)


@formats
@shapes
@biases
def test_one_vector_gives_the_rounded_reference(shape, row_format, has_bias, random_matrix, team):
    _, columns, num_rows = shape
    weight, x = random_matrix(num_rows, columns, row_format), torch.randn(columns)
    bias = torch.randn(num_rows) if has_bias else None
    residual = torch.randn(num_rows) if has_bias else None
    found = project(team, x, weight, bias, residual=residual)
    assert_is_rounded_product(found[None], x[None], weight, bias, 0 if residual is None else residual)


@quantized
def test_rounding_a_vector_costs_less_than_one_percent(row_format, random_matrix, team):
    """Of the result's norm: levels are off by up to half a 127th of a group's largest, which is 2 to 3 sigma."""
    weight, x = random_matrix(200, 512, row_format), torch.randn(4, 512)
    exact = reference.linear(x, weight)
    assert (linear(x, weight, team=team) - exact).norm() < 0.01 * exact.norm()


@formats
@pytest.mark.parametrize("size", [1e-30, 1e30], ids=["tiny", "huge"])
def test_vectors_of_any_size_are_multiplied(row_format, size, random_matrix, team):
    weight, x = random_matrix(9, 100, row_format), torch.randn(2, 100) * size
    assert_is_rounded_product(linear(x, weight, team=team), x, weight)
    assert_is_rounded_product(project(team, x[0].contiguous(), weight)[None], x[:1], weight)


@formats
def test_extreme_levels_do_not_overflow(row_format, random_matrix, team):
    """Every byte of a row and of the vector at its largest: what sums of products in 16 bits must hold."""
    weight = random_matrix(9, 512, row_format)
    signs = torch.where(torch.rand(3, 512) < 0.5, -1.0, 1.0)
    signs[1] = 1
    dense = torch.where(torch.rand(9, 512) < 0.5, -1.0, 1.0)
    dense[:4], dense[4] = 1, -1
    weight.rows[:] = quantize_rows(dense, row_format)
    assert_is_rounded_product(linear(signs, weight, team=team), signs, weight)
    for x in signs:
        assert_is_rounded_product(project(team, x.contiguous(), weight)[None], x[None], weight)


@formats
def test_zero_vectors_give_zero(row_format, random_matrix, team):
    weight = random_matrix(9, 100, row_format)
    assert torch.equal(linear(torch.zeros(3, 100), weight, team=team), torch.zeros(3, 9))
    assert torch.equal(project(team, torch.zeros(100), weight), torch.zeros(9))


@formats
def test_a_product_does_not_depend_on_the_number_of_threads(row_format, random_matrix, team, lone_team):
    weight, x = random_matrix(200, 333, row_format), torch.randn(3, 333)
    assert torch.equal(linear(x, weight, team=team), linear(x, weight, team=lone_team))
    assert torch.equal(project(team, x[0].contiguous(), weight), project(lone_team, x[0].contiguous(), weight))


@quantized
def test_a_vectors_product_does_not_depend_on_the_vectors_beside_it(row_format, random_matrix, team):
    """Tokens are multiplied four at a time: where the tiles end must not show."""
    weight, x = random_matrix(33, 100, row_format), torch.randn(7, 100)
    whole = linear(x, weight, team=team)
    for count in (1, 2, 3, 5):
        assert torch.equal(linear(x[:count], weight, team=team), whole[:count])


@quantized
@pytest.mark.parametrize("index", [[4], [0, 1, 2], [32, 3, 3, 17, 0, 5, 6, 7, 8], []], ids=len)
def test_rows_can_be_chosen_by_number(row_format, index, random_matrix, team):
    weight, x = random_matrix(33, 100, row_format), torch.randn(3, 100)
    vectors = batch.quantize_batch(x, row_format, team)
    found = batch.multiply(vectors, weight, team, np.array(index, dtype=np.int32))
    assert torch.equal(found, batch.multiply(vectors, weight, team)[:, index])


@quantized
def test_vectors_may_lie_apart(row_format, random_matrix, team):
    weight, x = random_matrix(9, 100, row_format), torch.full((3, 217), torch.nan)
    x[:, 10:110] = torch.randn(3, 100)
    view = x[:, 10:110]
    assert torch.equal(linear(view, weight, team=team), linear(view.contiguous(), weight, team=team))
    turned = x[:, 10:110].T.contiguous().T
    assert torch.equal(linear(turned, weight, team=team), linear(view.contiguous(), weight, team=team))


@pytest.mark.parametrize("row_format", FORMATS[1:], ids=str)
def test_unpacked_rows_are_the_weights(row_format, random_matrix, team):
    weight = random_matrix(21, 100, row_format)
    output = torch.empty(21, 128)
    batch.unpack(weight, output, team)
    assert torch.equal(output[:, :100], reference.dequantize_rows(weight.rows, 100, row_format))


def test_bf16_blocks_are_multiplied_one_after_another(monkeypatch, random_matrix, team):
    monkeypatch.setattr(batch, "UNPACK_WEIGHTS", 1000)
    weight, x = random_matrix(33, 100, RowFormat("bf16")), torch.randn(3, 100)
    assert_is_rounded_product(linear(x, weight, team=team), x, weight)


@formats
@pytest.mark.parametrize(("num_tokens", "num_rows"), [(0, 3), (2, 0), (0, 0)], ids=["T0-N3", "T2-N0", "T0-N0"])
def test_nothing_in_gives_nothing_out(num_tokens, num_rows, row_format, random_matrix, team):
    weight = random_matrix(3, 100, row_format).slice_rows(0, num_rows)
    assert reference.linear(torch.randn(num_tokens, 100), weight).shape == (num_tokens, num_rows)
    assert linear(torch.randn(num_tokens, 100), weight, team=team).shape == (num_tokens, num_rows)


@formats
def test_rows_of_bundles_are_read_across_their_stride(row_format, random_bundles, team):
    bundles: Bundles = random_bundles(9, 70, row_format, gated=True)
    x = torch.randn(2, 70)
    for matrix in (bundles.gate_proj, bundles.up_proj, bundles.down_proj_t):
        assert_is_rounded_product(linear(x, matrix, team=team), x, matrix)
        assert_is_rounded_product(project(team, x[0].contiguous(), matrix)[None], x[:1], matrix)


def test_the_last_bits_of_a_row_are_not_columns(random_matrix, team):
    """Padding columns and the bytes after the scales do not reach the result, whatever they hold."""
    row_format = RowFormat("q8", 32)
    weight, x = random_matrix(3, 33, row_format), torch.randn(2, 33)
    before, before_one = linear(x, weight, team=team), project(team, x[0].contiguous(), weight)
    weight.rows[:, 33:64] = 77
    weight.rows[:, 64 + 4 :] = 255
    assert torch.equal(linear(x, weight, team=team), before)
    assert torch.equal(project(team, x[0].contiguous(), weight), before_one)


@pytest.mark.parametrize("row_format", [RowFormat("f32"), RowFormat("bf16"), RowFormat("q4", 32)], ids=str)
def test_relu_leaves_nothing_below_zero(row_format, random_matrix, team):
    weight, x = random_matrix(33, 100, row_format), torch.randn(100)
    product = project(team, x, weight)
    found = project(team, x, weight, kind=layout.RELU)
    assert torch.equal(found, product.clamp(min=0))
    assert (product < 0).any()


@formats
@pytest.mark.parametrize("rows_per_task", [1, 7, 64, layout.MOST_SELECTED])
@pytest.mark.parametrize("threshold", [-1e9, -0.5, 0.0, 0.5, 1e9])
def test_select_lists_the_rows_above_the_threshold(row_format, rows_per_task, threshold, random_matrix, team):
    num_rows = max(150, rows_per_task + 6)
    weight, x = random_matrix(num_rows, 100, row_format), torch.randn(100)
    product = project(team, x, weight)
    expected = [
        [start + idx for idx, value in enumerate(part.tolist()) if value > threshold]
        for start, part in zip(range(0, num_rows, rows_per_task), product.split(rows_per_task), strict=True)
    ]
    for num_static in (0, team.num_threads):
        assert select(team, x, weight, threshold, rows_per_task, num_static=num_static) == expected


@formats
@pytest.mark.parametrize("is_static", [False, True], ids=["drawn", "static"])
@pytest.mark.parametrize("rows_per_task", [5, 40])
def test_several_matrices_are_one_operation(row_format, is_static, rows_per_task, random_matrix, team):
    """Queries, keys and values: different heights, some with a bias; the tasks of one end where the next begin."""
    matrices = [(random_matrix(rows, 100, row_format, seed=rows), None) for rows in (33, 1, 8)]
    matrices[1] = (matrices[1][0], torch.ones(1))
    x, outputs = torch.randn(100), [nan_floats(rows) for rows in (33, 1, 8)]
    num_static = team.num_threads if is_static else 0
    operation, kept = project_operation(
        team, x, matrices, outputs, [None] * 3, columns=100, rows_per_task=rows_per_task, num_static=num_static
    )
    run(team, operation)
    for output, (weight, bias) in zip(kept[4], matrices, strict=True):
        assert torch.equal(torch.from_numpy(output), project(team, x, weight, bias))


@formats
@pytest.mark.parametrize("ranks", [(5, 70, 3, 33)], ids=str)
def test_chosen_matrices_of_different_widths_have_vectors_of_their_own(row_format, ranks, random_matrix, team):
    """As the second matrices of experts' predictors."""
    matrices = [(random_matrix(40, rank, row_format, seed=rank), None) for rank in ranks]
    chosen = np.array([3, 1], dtype=np.int64)
    x = torch.full((2, 128), torch.nan)
    for slot, idx in enumerate(chosen):
        x[slot, : ranks[idx]] = torch.randn(ranks[idx])
    outputs = [nan_floats(40) for _ in chosen]
    operation, kept = project_operation(
        team, x, matrices, outputs, [None] * 2, columns=128, chosen=chosen, input_stride=4 * 128
    )
    run(team, operation)
    for slot, idx in enumerate(chosen):
        expected = project(team, x[slot, : ranks[idx]].contiguous(), matrices[idx][0])
        assert torch.equal(torch.from_numpy(kept[4][slot]), expected)


@pytest.mark.parametrize(
    "x",
    [torch.ones(2, 99), torch.ones(100), torch.ones(2, 100, dtype=torch.float64), torch.ones(1, 2, 100)],
    ids=["narrow", "one dimension", "float64", "three dimensions"],
)
def test_an_x_that_does_not_fit_is_refused(x, random_matrix, team):
    with pytest.raises(ValueError, match=r"x is torch\..*, expected float32 \[T, 100\]"):
        linear(x, random_matrix(3, 100, RowFormat("f32")), team=team)


@pytest.mark.parametrize("shape", [(2,), (1, 3), ()])
def test_a_bias_that_does_not_fit_is_refused(shape, random_matrix, team):
    with pytest.raises(ValueError, match=r"bias has shape \(.*\), expected \(3,\)"):
        linear(torch.ones(1, 100), random_matrix(3, 100, RowFormat("f32")), torch.ones(shape), team=team)


def test_the_bound_of_these_tests_is_no_carte_blanche(random_matrix, team):
    """One level of one weight off is seen."""
    weight, x = random_matrix(3, 100, RowFormat("q4", 32)), torch.ones(1, 100)
    found = linear(x, weight, team=team)
    assert_is_rounded_product(found, x, weight)
    weight.rows[0, 0] ^= 1
    with pytest.raises(AssertionError):
        assert_is_rounded_product(found, x, weight)
