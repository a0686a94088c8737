"""GGUF's Q4_0 and Q8_0 rows become ours without changing a weight: held against the gguf package's own decoder."""

import gguf
import numpy as np
import pytest
import torch

from hybrid_kernels.quantization.reference import dequantize_rows
from hybrid_kernels.quantization.row_format import GROUP_SIZES, RowFormat
from hybrid_runtime.store.repack import can_repack, repack_rows

TYPES = {"Q4_0": (gguf.GGMLQuantizationType.Q4_0, 18), "Q8_0": (gguf.GGMLQuantizationType.Q8_0, 34)}
PAIRS = [("Q4_0", RowFormat("q4", 32)), ("Q4_0", RowFormat("q8", 32)), ("Q8_0", RowFormat("q8", 32))]
SHAPES = [(1, 32), (1, 96), (4, 32), (3, 96), (5, 4096)]

pairs = pytest.mark.parametrize(("dtype", "row_format"), PAIRS, ids=str)
shapes = pytest.mark.parametrize(("num_rows", "columns"), SHAPES, ids=str)


def random_blocks(num_rows, columns, dtype) -> torch.Tensor:
    """Every byte of the levels random, so that all levels occur; scales of both signs, zero and subnormal ones too."""
    generator = torch.Generator().manual_seed(0)
    _, block_bytes = TYPES[dtype]
    blocks = torch.randint(0, 256, (num_rows, columns // 32, block_bytes), dtype=torch.uint8, generator=generator)
    scales = torch.randn(num_rows, columns // 32, 1, generator=generator).half()
    scales[:, 0] = torch.tensor(6e-8).half()
    scales[:, -1] *= torch.arange(num_rows)[:, None] % 2
    blocks[..., :2] = scales.view(torch.uint8)
    return blocks.view(num_rows, columns // 32 * block_bytes)


@pairs
@shapes
def test_repacking_is_lossless_bit_for_bit(dtype, row_format, num_rows, columns):
    raw = random_blocks(num_rows, columns, dtype)
    rows = repack_rows(raw, dtype, row_format)
    assert rows.dtype == torch.uint8
    assert rows.shape == (num_rows, row_format.row_bytes(columns))
    found = dequantize_rows(rows, columns, row_format).numpy()
    expected = gguf.dequantize(raw.numpy(), TYPES[dtype][0])
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pairs
def test_what_gguf_quantised_is_kept(dtype, row_format):
    weights = np.random.default_rng(0).normal(size=(7, 256)).astype(np.float32)
    raw = gguf.quantize(weights, TYPES[dtype][0])
    rows = repack_rows(torch.from_numpy(raw), dtype, row_format)
    found = dequantize_rows(rows, 256, row_format).numpy()
    assert np.array_equal(found, gguf.dequantize(raw, TYPES[dtype][0]))
    assert np.abs(found - weights).max() < 0.3


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("kind", ["q4", "q8"])
def test_only_the_same_groups_and_enough_levels_can_be_repacked(dtype, kind, group):
    expected = group == 32 and (dtype, kind) != ("Q8_0", "q4")
    assert can_repack(dtype, 4096, RowFormat(kind, group)) == expected


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q4_K", "Q6_K", "Q4_1"])
def test_other_types_are_not_repacked(dtype):
    assert not can_repack(dtype, 4096, RowFormat("q8", 32))
    assert not can_repack(dtype, 4096, RowFormat("q4", 32))


@pytest.mark.parametrize("row_format", [RowFormat("f32"), RowFormat("bf16")], ids=str)
@pytest.mark.parametrize("dtype", TYPES)
def test_unquantised_rows_have_no_place_for_levels(dtype, row_format):
    assert not can_repack(dtype, 4096, row_format)


@pytest.mark.parametrize("columns", [1, 31, 33, 4095])
def test_rows_that_no_block_fills_are_not_repacked(columns):
    assert not can_repack("Q4_0", columns, RowFormat("q4", 32))
