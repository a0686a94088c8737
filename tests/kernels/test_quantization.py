"""Packed rows: the layout word by word, the q4 fit against plain rounding, the Numba twin against the reference."""

import numba
import numpy as np
import pytest
import torch

from hybrid_kernels.quantization import cpu, op, reference
from hybrid_kernels.quantization.op import dequantize_rows, quantize_rows
from hybrid_kernels.quantization.row_format import GROUP_SIZES, ROW_ALIGNMENT, RowFormat

QUANTIZED = [RowFormat(kind, group) for kind in ("q8", "q4") for group in GROUP_SIZES]
FORMATS = [RowFormat("f32"), RowFormat("bf16"), *QUANTIZED]
# The last three give the twin's tiles one group short of, exactly, and one group more than its 64 lanes.
SHAPES = [(1, 1), (1, 31), (3, 333), (2, 128), (9, 897), (1, 63 * 32), (2, 32 * 64), (1, 65 * 128)]

formats = pytest.mark.parametrize("row_format", FORMATS, ids=str)
quantized = pytest.mark.parametrize("row_format", QUANTIZED, ids=str)
groups = pytest.mark.parametrize("group", GROUP_SIZES, ids=lambda group: f"G{group}")
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"N{shape[0]}-K{shape[1]}")
twins = pytest.mark.parametrize("twin", [reference, cpu], ids=["reference", "cpu"])


def gaussian(*shape) -> torch.Tensor:
    return torch.randn(shape) * 0.02


def laplace(*shape) -> torch.Tensor:
    return torch.distributions.Laplace(0.0, 0.02).sample(shape)


def uniform(*shape) -> torch.Tensor:
    return torch.rand(shape) * 0.1 - 0.05


def outliers(*shape) -> torch.Tensor:
    return gaussian(*shape) * torch.where(torch.rand(shape) < 0.01, 20, 1)


@pytest.fixture(autouse=True)
def _one_numba_thread():
    """As conftest.py wants it of torch."""
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    yield
    numba.set_num_threads(before)


distributions = pytest.mark.parametrize("draw", [gaussian, laplace, uniform, outliers])


def subnormal(*shape) -> torch.Tensor:
    """So small that q8's scales have few bits left in float16, and extremes lie far above level 127."""
    return gaussian(*shape) * 4e-4


def group_errors(rows, weights, row_format) -> torch.Tensor:
    """Squared error of every group, float64 [N, groups]."""
    padded = row_format.padded_columns(weights.shape[1])
    difference = reference.dequantize_rows(rows, padded, row_format).double()
    difference[:, : weights.shape[1]] -= weights.double()
    return difference.view(len(rows), -1, row_format.group).square().sum(-1)


def squared_norms(weights, row_format) -> torch.Tensor:
    return reference.grouped_columns(weights.double(), row_format).square().sum(-1)


def plainly_rounded_errors(weights, group) -> torch.Tensor:
    """What llama.cpp's Q4_0 does: the extreme value at -8, its scale in float16, every weight to the nearest level."""
    grouped = weights.view(len(weights), -1, group)
    extremes = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    scales = (extremes / -8).half().float()
    levels = (grouped / scales).round().clamp(-8, 7)
    return (grouped.double() - (scales * levels).double()).square().sum(-1)


@pytest.mark.parametrize(
    ("row_format", "row_bytes"),
    [
        ("f32", 16384),
        ("bf16", 8192),
        ("q8 group 32", 4352),
        ("q4 group 32", 2304),
        ("q4 group 64", 2176),
        ("q4 group 128", 2112),
    ],
)
def test_a_row_of_4096_has_the_documented_size(row_format, row_bytes):
    assert {str(each): each.row_bytes(4096) for each in FORMATS}[row_format] == row_bytes


@formats
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 127, 129, 4096, 14336])
def test_row_sizes_add_up(row_format, columns):
    padded, used = row_format.padded_columns(columns), row_format.value_bytes(columns) + row_format.scale_bytes(columns)
    assert 0 <= padded - columns < max(1, row_format.group)
    assert row_format.row_bytes(columns) % ROW_ALIGNMENT == 0
    assert 0 <= row_format.row_bytes(columns) - used < ROW_ALIGNMENT


@groups
@twins
def test_nibble_i_of_word_j_is_column_i_times_an_eighth_of_the_group_plus_j(group, twin):
    row_format = RowFormat("q4", group)
    levels = torch.randint(-8, 8, (3, 4 * group))
    levels.view(3, 4, group)[..., 5] = -8  # so that the scale is found again
    scales = torch.tensor([0.5, -0.25, 1.0, 2.0])
    weights = (levels.view(3, 4, group) * scales[:, None]).view(3, -1)
    rows = twin.quantize_rows(weights, row_format)
    for row, expected in zip(rows.tolist(), levels.tolist(), strict=True):
        for group_idx in range(4):
            for j in range(group // 8):
                start = group_idx * (group // 2) + 4 * j
                word = int.from_bytes(bytes(row[start : start + 4]), "little")
                for i in range(8):
                    assert ((word >> (4 * i)) & 0xF) - 8 == expected[group_idx * group + (group // 8) * i + j]
        found_scales = np.frombuffer(bytes(row), "<f2", 4, 4 * group // 2)
        assert found_scales.tolist() == scales.tolist()


@groups
def test_pack_and_unpack_are_inverse(group):
    levels = torch.randint(-8, 8, (2, 3, group), dtype=torch.int8)
    packed = reference.pack_nibbles(levels)
    assert packed.shape == (2, 3, group // 2)
    assert torch.equal(reference.unpack_nibbles(packed), levels)


@formats
@shapes
def test_dequantize_is_the_documented_layout(row_format, shape, decode_rows):
    rows = quantize_rows(gaussian(*shape), row_format)
    assert rows.shape == (shape[0], row_format.row_bytes(shape[1]))
    found = dequantize_rows(rows, shape[1], row_format)
    assert found.dtype == torch.float32
    # scale * level is one float32 product, the decoder's is in float64
    np.testing.assert_allclose(found.numpy(), decode_rows(rows, shape[1], row_format), rtol=2.0**-23)


@formats
@shapes
def test_padding_columns_are_zero_weights_and_the_rest_of_a_row_zero_bytes(row_format, shape):
    rows = quantize_rows(gaussian(*shape) + 1, row_format)
    padded = row_format.padded_columns(shape[1])
    assert (dequantize_rows(rows, padded, row_format)[:, shape[1] :] == 0).all()
    used = row_format.value_bytes(shape[1]) + row_format.scale_bytes(shape[1])
    assert (rows[:, used:] == 0).all()


@shapes
def test_f32_rows_hold_the_weights_and_are_read_without_a_copy(shape):
    weights, row_format = gaussian(*shape), RowFormat("f32")
    rows = quantize_rows(weights, row_format)
    found = dequantize_rows(rows, shape[1], row_format)
    assert torch.equal(found, weights)
    assert found.data_ptr() == rows.data_ptr()


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bf16_rows_hold_the_rounded_weights(shape, dtype):
    weights = gaussian(*shape).to(dtype)
    rows = quantize_rows(weights, RowFormat("bf16"))
    assert torch.equal(dequantize_rows(rows, shape[1], RowFormat("bf16")), weights.bfloat16().float())


@quantized
@twins
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_quantise_as_their_float32(row_format, twin, dtype):
    weights = gaussian(3, 333).to(dtype)
    assert torch.equal(twin.quantize_rows(weights, row_format), twin.quantize_rows(weights.float(), row_format))


@formats
def test_transposed_weights_are_read_across_their_strides(row_format):
    weights = gaussian(333, 5)
    assert torch.equal(quantize_rows(weights.T, row_format), quantize_rows(weights.T.contiguous(), row_format))


@formats
@pytest.mark.parametrize("columns", [1, 100, 4096])
def test_no_bytes_are_no_rows(row_format, columns):
    rows = torch.empty(0, row_format.row_bytes(columns), dtype=torch.uint8)
    assert dequantize_rows(rows, columns, row_format).shape == (0, columns)


@groups
@twins
@distributions
def test_the_q4_fit_beats_plain_rounding_and_is_never_worse(group, twin, draw):
    weights, row_format = draw(300, 8 * group), RowFormat("q4", group)
    fitted = group_errors(twin.quantize_rows(weights, row_format), weights, row_format)
    plain = plainly_rounded_errors(weights, group)
    # Both scales are rounded to float16 (2^-11 of the scale). Plain rounding may be lucky there, the fit unlucky.
    allowed = (plain.sqrt() + 2 * 2.0**-11 * squared_norms(weights, row_format).sqrt()).square()
    assert (fitted <= allowed).all()
    assert (fitted <= plain).double().mean() > 0.99
    assert fitted.mean() < 0.98 * plain.mean()  # under outliers, the few groups that hold them are most of the mean
    assert (fitted / plain).mean() < 0.93


@groups
@twins
def test_one_outlier_does_not_cost_the_other_weights(group, twin):
    """Where the extreme stands alone, clipping it is better than a scale that rounds everything else to zero."""
    weights = torch.full((1, group), 0.05)
    weights[0, ::2] *= -1
    weights[0, 3] = 0.5
    row_format = RowFormat("q4", group)
    error = group_errors(twin.quantize_rows(weights, row_format), weights, row_format).item()
    assert error < 0.9 * plainly_rounded_errors(weights, group).item()


@groups
@twins
@distributions
def test_q8_is_within_half_a_step(group, twin, draw):
    weights, row_format = draw(20, 8 * group), RowFormat("q8", group)
    found = dequantize_rows(twin.quantize_rows(weights, row_format), 8 * group, row_format)
    step = weights.view(20, 8, group).abs().amax(-1, keepdim=True) / 127
    difference = (found - weights).view(20, 8, group).abs()
    # half a step, and float16's half ulp of the scale times up to 127 levels where the extreme is clipped
    assert (difference <= step * (0.5 + 127 * 2.0**-11 + 1e-4)).all()
    assert (difference <= step * 0.5003).double().mean() > 0.99


@quantized
@twins
def test_the_scale_is_the_extremes_or_the_least_squares_one(row_format, twin):
    """Levels are the nearest ones for the float16 scale in the row, not for the scale before it was rounded."""
    weights = gaussian(5, 4 * row_format.group)
    rows = twin.quantize_rows(weights, row_format)
    start, length = row_format.value_bytes(weights.shape[1]), row_format.scale_bytes(weights.shape[1])
    scales = rows[:, start : start + length].contiguous().view(torch.float16).float()[..., None]
    assert scales.isfinite().all()
    largest, smallest = (7, -8) if row_format.kind == "q4" else (127, -127)
    nearest = (weights.view(5, 4, -1) / scales).round().clamp(smallest, largest) * scales
    assert torch.equal(dequantize_rows(rows, weights.shape[1], row_format), nearest.view(5, -1))


@quantized
@twins
@distributions
def test_dequantised_rows_quantise_to_themselves(row_format, twin, draw):
    weights = draw(50, 4 * row_format.group)
    once = dequantize_rows(twin.quantize_rows(weights, row_format), weights.shape[1], row_format)
    again = twin.quantize_rows(once, row_format)
    errors, norms = group_errors(again, once, row_format), squared_norms(once, row_format)
    if row_format.kind == "q8":
        assert (errors == 0).all()
    else:  # the scale is found up to its rounding to float16, 2^-11 of every weight
        assert (errors <= 2.0**-22 * norms).all()
        assert (errors == 0).double().mean() > 0.95


@quantized
@twins
@pytest.mark.parametrize("constant", [1.0, -1.0, 0.5, -0.25, 1.5, 3.0 * 2**-10, 256.0])
def test_a_constant_group_is_exact_where_an_eighth_of_it_is_a_float16(row_format, twin, constant):
    weights = torch.full((2, 2 * row_format.group), constant)
    found = dequantize_rows(twin.quantize_rows(weights, row_format), weights.shape[1], row_format)
    if row_format.kind == "q4":
        assert torch.equal(found, weights)
    else:  # 127 does not divide it: float16's half ulp
        torch.testing.assert_close(found, weights, rtol=2.0**-11, atol=0)


@quantized
@twins
def test_zero_groups_are_zero_beside_others(row_format, twin):
    weights = gaussian(3, 3 * row_format.group)
    weights[:, row_format.group : 2 * row_format.group] = 0
    rows = twin.quantize_rows(weights, row_format)
    found = dequantize_rows(rows, weights.shape[1], row_format).view(3, 3, -1)
    assert (found[:, 1] == 0).all()
    assert (found[:, 0] != 0).any()
    assert torch.equal(
        twin.quantize_rows(torch.zeros(2, 64), row_format), reference.quantize_rows(torch.zeros(2, 64), row_format)
    )


@quantized
@twins
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-20, 1e-8, 1e-7, 1e-6, 1e-5])
def test_weights_below_float16s_scales_become_small_never_wrong(row_format, twin, size):
    """No NaN, and no group worse than float16's smallest step of a scale: 2^-25 on each of at most 127 levels."""
    weights = torch.randn(3, 2 * row_format.group) * size
    found = dequantize_rows(twin.quantize_rows(weights, row_format), weights.shape[1], row_format)
    assert found.isfinite().all()
    extreme = weights.abs().amax()
    assert (found - weights).abs().amax() <= min(extreme * 1.01, extreme * 0.16 + 127 * 2.0**-25)


@quantized
@shapes
def test_the_twin_is_the_reference(row_format, shape):
    for draw in (gaussian, laplace, uniform, outliers, *([subnormal] if row_format.kind == "q8" else [])):
        weights = draw(*shape)
        found, expected = cpu.quantize_rows(weights, row_format), reference.quantize_rows(weights, row_format)
        assert found.dtype == torch.uint8
        assert found.shape == expected.shape
        if row_format.kind == "q8":
            assert torch.equal(found, expected)
            continue
        errors, allowed = group_errors(found, weights, row_format), group_errors(expected, weights, row_format)
        # Gains are float32 sums of G <= 128 terms in another order: equal up to G * 2^-24 of <w, w>, so is the choice.
        assert (errors <= allowed + 1e-5 * squared_norms(weights, row_format)).all()
        assert errors.sum() <= allowed.sum() * (1 + 1e-4)
        assert (found == expected).double().mean() > 0.99


@quantized
def test_the_bytes_do_not_depend_on_the_number_of_threads(row_format):
    weights = gaussian(40, 1000)
    one = cpu.quantize_rows(weights, row_format)
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    assert torch.equal(cpu.quantize_rows(weights, row_format), one)


@quantized
def test_rows_do_not_depend_on_the_rows_beside_them(row_format):
    """A store is written in blocks; where the blocks end must not show."""
    weights = gaussian(70, 333)
    whole = cpu.quantize_rows(weights, row_format)
    parts = [cpu.quantize_rows(part, row_format) for part in weights.split(23)]
    assert torch.equal(torch.cat(parts), whole)


@formats
def test_large_matrices_of_quantised_kinds_go_to_the_twin(monkeypatch, row_format):
    seen = []

    def recorded(weights, found_format):
        seen.append((tuple(weights.shape), found_format))
        return reference.quantize_rows(weights, found_format)

    monkeypatch.setattr(cpu, "quantize_rows", recorded)
    monkeypatch.setattr(op, "SMALLEST_COMPILED", 200)
    quantize_rows(gaussian(1, 199), row_format)
    assert seen == []
    quantize_rows(gaussian(2, 100), row_format)
    assert seen == ([((2, 100), row_format)] if row_format.is_quantized else [])


@quantized
@twins
@pytest.mark.parametrize("size", [1e7, 1e30, 3e38])
def test_weights_beyond_float16s_scales_are_refused_not_zeroed(row_format, twin, size):
    weights = gaussian(3, 2 * row_format.group)
    weights[1, 5] = size
    with pytest.raises(ValueError, match=r"a group's scale is .*e\+.*, above float16's 65504: use bf16 or f32 here"):
        twin.quantize_rows(weights, row_format)
    with pytest.raises(ValueError, match=r"above float16's 65504"):
        twin.quantize_rows(torch.full((2, 64), -size), row_format)


@quantized
@twins
def test_weights_near_the_end_of_the_range_are_kept(row_format, twin):
    """No fitted level of a q4 group's extreme lies below 5, nor of a q8 group's below 127."""
    weights = gaussian(3, 4 * row_format.group)
    weights *= (5 if row_format.kind == "q4" else 126) * 65504 / weights.abs().amax()
    errors = group_errors(twin.quantize_rows(weights, row_format), weights, row_format)
    assert (errors < (0.02 if row_format.kind == "q4" else 1e-4) * squared_norms(weights, row_format)).all()


@formats
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused(row_format, value):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weights = gaussian(5, 100).to(dtype)
        weights[3, 99] = value
        with pytest.raises(ValueError, match="weights contain NaN or Inf"):
            quantize_rows(weights, row_format)


def test_a_number_that_bfloat16_would_round_to_infinity_is_refused():
    weights = torch.tensor([[1.0, -torch.finfo(torch.float32).max]])
    assert weights.bfloat16().isinf().any()
    with pytest.raises(ValueError, match=r"a weight is 3.403e\+38, above bfloat16's 3.39e\+38: use f32 here"):
        quantize_rows(weights, RowFormat("bf16"))
    assert torch.equal(dequantize_rows(quantize_rows(weights, RowFormat("f32")), 2, RowFormat("f32")), weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.bool])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match=r"weights are torch\..*, expected float32, float16 or bfloat16"):
        quantize_rows(torch.ones(2, 32, dtype=dtype), RowFormat("q4", 32))


@pytest.mark.parametrize("shape", [(), (32,), (1, 2, 32)])
def test_other_ranks_are_refused(shape):
    with pytest.raises(ValueError, match=r"weights have shape \(.*\), expected two dimensions"):
        quantize_rows(torch.ones(shape), RowFormat("q4", 32))


@pytest.mark.parametrize(
    "rows",
    [torch.zeros(2, 63, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8), torch.zeros(2, 64, dtype=torch.int8)],
    ids=["short", "one dimension", "int8"],
)
def test_bytes_of_another_shape_are_refused(rows):
    with pytest.raises(ValueError, match=r"rows are torch\..*, expected uint8 \[N, 64\] for 70 columns of q4 group 32"):
        dequantize_rows(rows, 70, RowFormat("q4", 32))


@pytest.mark.parametrize(
    ("kind", "group", "message"),
    [
        ("q5", 32, "row kind 'q5' is not one of f32, bf16, q8, q4"),
        (None, 0, "row kind None is not one of"),
        ("q4", 0, r"group 0 of a q4 row is not one of \(32, 64, 128\)"),
        ("q8", 256, "group 256 of a q8 row is not one of"),
        ("q4", -32, "group -32 of a q4 row is not one of"),
        ("f32", 32, "a f32 row has no groups, found group 32"),
        ("bf16", 128, "a bf16 row has no groups, found group 128"),
        ("q4", 32.0, "group 32.0 is not a whole number"),
        ("q4", "32", "group '32' is not a whole number"),
        ("f32", False, "group False is not a whole number"),
    ],
)
def test_formats_that_no_kernel_reads_are_refused(kind, group, message):
    with pytest.raises(ValueError, match=message):
        RowFormat(kind, group)
