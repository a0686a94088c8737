"""Rows drawn in the packed layout are what they stand for: mean, spread, planted values, zero padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hybrid_kernels.quantization.op import dequantize_rows
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.synthetic.random_rows import clear_first, generator_of, plant_first, random_rows

FORMATS = [RowFormat("f32"), RowFormat("bf16"), *(RowFormat(kind, g) for kind in ("q8", "q4") for g in (32, 64, 128))]


def values(rows, columns, row_format):
    return dequantize_rows(torch.from_numpy(rows), columns, row_format)


@pytest.mark.parametrize("row_format", FORMATS, ids=str)
def test_weights_have_mean_zero_and_the_asked_spread(row_format):
    rows = random_rows(generator_of(1, "x"), 512, 1024, row_format, 0.02)
    weights = values(rows, 1024, row_format)
    assert rows.shape == (512, row_format.row_bytes(1024))
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(weights.mean().item()) < 0.02 * 4 / 512 * 2  # four standard errors, of whole groups at that
    assert weights.mean(0).abs().max() < 0.02 * 6 / 512**0.5


@pytest.mark.parametrize("row_format", FORMATS, ids=str)
@pytest.mark.parametrize("columns", [1, 33, 172, 250])
def test_padding_is_zero(row_format, columns):
    rows = random_rows(generator_of(1, "x"), 5, columns, row_format, 1.0)
    used = row_format.value_bytes(columns) + row_format.scale_bytes(columns)
    assert not rows[:, used:].any()
    padded = values(rows, row_format.padded_columns(columns), row_format)
    assert not padded[:, columns:].any()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_q8_levels_stay_in_the_range_that_quantising_gives(group):
    row_format = RowFormat("q8", group)
    levels = random_rows(generator_of(2, "x"), 64, 1024, row_format, 1.0)[:, :1024].view(np.int8)
    assert (levels.min(), levels.max()) == (-127, 127)


@pytest.mark.parametrize("row_format", FORMATS, ids=str)
def test_a_planted_value_is_the_first_weight_and_the_rest_stays(row_format):
    rows = random_rows(generator_of(3, "x"), 7, 256, row_format, 0.1)
    before = values(rows.copy(), 256, row_format)
    planted = np.array([-3.1, -0.5, -1e-3, 0.0, 0.02, 1.0, 2.7])
    plant_first(rows, 256, row_format, planted)
    after = values(rows, 256, row_format)
    # float16 has 11 bits, bfloat16 8
    tolerance = {"bf16": 2**-8, "f32": 1e-7}.get(row_format.kind, 2**-10)
    assert after[:, 0].numpy() == pytest.approx(planted, rel=tolerance, abs=1e-6)
    group = row_format.group or 1
    assert not after[:, 1:group].any()
    assert torch.equal(after[:, group:], before[:, group:])


@pytest.mark.parametrize("row_format", FORMATS, ids=str)
def test_clearing_the_first_weight_leaves_the_others(row_format):
    rows = random_rows(generator_of(4, "x"), 7, 256, row_format, 0.1)
    before = values(rows.copy(), 256, row_format)
    clear_first(rows, row_format)
    after = values(rows, 256, row_format)
    assert not after[:, 0].any()
    assert torch.equal(after[:, 1:], before[:, 1:])


def test_each_name_and_seed_has_a_stream_of_its_own():
    first, same, renamed, reseeded = (
        random_rows(generator_of(seed, name), 4, 64, RowFormat("q4", 32), 1.0)
        for seed, name in ((1, "a"), (1, "a"), (1, "b"), (2, "a"))
    )
    assert np.array_equal(first, same)
    assert not np.array_equal(first, renamed)
    assert not np.array_equal(first, reseeded)
