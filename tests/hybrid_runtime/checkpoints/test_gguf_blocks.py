"""Dequantised blocks: bit-equal to the `gguf` package's own, whatever bytes a block holds with finite scales."""

import struct

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_runtime.checkpoints.gguf_blocks import BLOCK_FORMATS
from hybrid_runtime.checkpoints.gguf_file import open_gguf
from hybrid_runtime.checkpoints.tensor_file import read_raw_rows, read_rows
from hybrid_runtime.errors import CheckpointError

FORMATS = pytest.mark.parametrize("name", BLOCK_FORMATS)
SUBNORMAL, LARGEST, MINUS_ZERO, INFINITY, NAN = 0x0001, 0x7BFF, 0x8000, 0x7C00, 0xFE01


def with_scales(name: str, blocks: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """The blocks with every float16 scale replaced: bits is uint16 [N blocks, number of scales]."""
    blocks = blocks.copy()
    for column, offset in enumerate(BLOCK_FORMATS[name].scale_offsets):
        blocks[:, offset : offset + 2] = bits[:, column : column + 1].astype("<u2").view(np.uint8)
    return blocks


def random_blocks(name: str, num_blocks: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    block_format = BLOCK_FORMATS[name]
    blocks = rng.integers(0, 256, (num_blocks, block_format.num_bytes), dtype=np.uint8)
    bits = rng.integers(0, 2**16, (num_blocks, len(block_format.scale_offsets)), dtype=np.uint16)
    bits[(bits & INFINITY) == INFINITY] ^= 0x4000  # every finite float16, subnormals included
    return with_scales(name, blocks, bits)


def assert_equals_gguf(name: str, blocks: np.ndarray) -> None:
    ours = BLOCK_FORMATS[name].dequantize(torch.from_numpy(blocks)).numpy()
    theirs = gguf.dequantize(blocks, gguf.GGMLQuantizationType[name])
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@FORMATS
def test_sizes_are_the_gguf_packages(name):
    elements, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert (BLOCK_FORMATS[name].num_elements, BLOCK_FORMATS[name].num_bytes) == (elements, num_bytes)


@FORMATS
@pytest.mark.parametrize("num_blocks", [1, 3, 2000])
def test_random_blocks_are_bit_equal_to_gguf(name, num_blocks):
    assert_equals_gguf(name, random_blocks(name, num_blocks))


@FORMATS
@pytest.mark.parametrize("scale", [0, SUBNORMAL, 0x03FF, 0x8001, LARGEST, LARGEST | 0x8000, MINUS_ZERO], ids=hex)
def test_extreme_scales_are_bit_equal_to_gguf(name, scale):
    blocks = random_blocks(name, 16)
    assert_equals_gguf(name, with_scales(name, blocks, np.full((16, 2), scale, dtype=np.uint16)))


@FORMATS
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bytes_with_finite_scales_are_bit_equal_to_gguf(name, data):
    block_format = BLOCK_FORMATS[name]
    content = data.draw(st.binary(min_size=block_format.num_bytes, max_size=block_format.num_bytes))
    finite = st.integers(0, LARGEST) | st.integers(MINUS_ZERO, MINUS_ZERO | LARGEST)
    bits = np.array([[data.draw(finite) for _ in block_format.scale_offsets]], dtype=np.uint16)
    assert_equals_gguf(name, with_scales(name, np.frombuffer(content, np.uint8)[None], bits))


@FORMATS
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), bad=st.sampled_from([INFINITY, INFINITY | 0x8000, NAN, 0x7C01]))
def test_a_block_is_finite_exactly_when_its_scales_are(name, seed, bad):
    blocks = random_blocks(name, 8, seed)
    block_format = BLOCK_FORMATS[name]
    for offset in block_format.scale_offsets:
        broken = blocks.copy()
        broken[5, offset : offset + 2] = np.array([bad], dtype="<u2").view(np.uint8)
        finite = torch.isfinite(block_format.dequantize(torch.from_numpy(broken))).all(dim=1)
        assert finite.tolist() == [True] * 5 + [False] + [True] * 2
        scales = block_format.scales(torch.from_numpy(broken))
        assert torch.isfinite(scales).all(dim=1).tolist() == finite.tolist()


def file_of(path, name: str, blocks: np.ndarray, shape: tuple[int, ...]):
    """A GGUF file of one tensor `w`, written by hand so that it may hold what no quantiser makes."""
    number = gguf.GGMLQuantizationType[name].value
    dims = b"".join(struct.pack("<Q", size) for size in reversed(shape))
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", 1) + b"w"
    head += struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", number, 0)
    path.write_bytes(head + bytes(-len(head) % 32) + blocks.tobytes())
    return open_gguf(path).tensors["w"]


@FORMATS
@pytest.mark.parametrize("chunk_bytes", [500, 4 << 20])
def test_rows_of_a_file_are_slices_of_the_whole(name, chunk_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr("hybrid_runtime.checkpoints.tensor_file.BLOCK_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr("hybrid_runtime.checkpoints.tensor_file.CHUNK_BYTES", chunk_bytes)
    block_format = BLOCK_FORMATS[name]
    blocks = random_blocks(name, 7 * 3)
    info = file_of(tmp_path / "model.gguf", name, blocks, (7, 3 * block_format.num_elements))
    whole = gguf.dequantize(blocks.reshape(7, -1), gguf.GGMLQuantizationType[name])
    for start, stop in ((0, None), (0, 1), (2, 6), (6, 7), (3, 3)):
        np.testing.assert_array_equal(read_rows(info, start, stop).numpy(), whole[start:stop])
        raw = read_raw_rows(info, start, 7 if stop is None else stop)
        np.testing.assert_array_equal(raw.numpy(), blocks.reshape(7, -1)[start:stop])


@FORMATS
@pytest.mark.parametrize("chunk_bytes", [500, 4 << 20])
def test_a_broken_scale_is_refused_with_the_index_of_its_block(name, chunk_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr("hybrid_runtime.checkpoints.tensor_file.BLOCK_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr("hybrid_runtime.checkpoints.tensor_file.CHUNK_BYTES", chunk_bytes)
    block_format = BLOCK_FORMATS[name]
    blocks = random_blocks(name, 5 * 4)
    offset = block_format.scale_offsets[-1]
    blocks[2 * 4 + 3, offset : offset + 2] = np.array([NAN], dtype="<u2").view(np.uint8)
    info = file_of(tmp_path / "model.gguf", name, blocks, (5, 4 * block_format.num_elements))
    place = rf"model\.gguf: tensor 'w', element \(2, {3 * block_format.num_elements}\): the block's scale"
    with pytest.raises(CheckpointError, match=place):
        read_rows(info)
    with pytest.raises(CheckpointError, match=place):
        read_raw_rows(info, 2, 3)
    read_rows(info, 0, 2)
    read_raw_rows(info, 3, 5)


def test_rows_of_a_block_quantised_vector_keep_blocks_whole(tmp_path):
    blocks = random_blocks("Q8_0", 3)
    info = file_of(tmp_path / "model.gguf", "Q8_0", blocks, (96,))
    whole = gguf.dequantize(blocks.reshape(-1), gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(read_rows(info).numpy(), whole)
    np.testing.assert_array_equal(read_rows(info, 32, 96).numpy(), whole[32:])
    with pytest.raises(ValueError, match="cut a Q8_0 block; ask for multiples of 32"):
        read_rows(info, 16, 96)
    with pytest.raises(ValueError, match="has no raw rows"):
        read_raw_rows(info, 0, 32)
