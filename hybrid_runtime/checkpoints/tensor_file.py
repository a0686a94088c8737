"""A tensor inside a checkpoint file, and the reading of its rows into fresh memory.

Safetensors and GGUF readers describe what they found as `TensorInfo`; the loaders above ask for rows without knowing
the format. Reads go straight into the tensor that is returned, never through a mapping (see `file_reading.py`), in
chunks small enough that the check for NaN and Inf finds each still in the processor's cache. Peak memory is the result
plus one chunk.

What the tensors are for (names, transposes, families) is not known here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from hybrid_runtime.checkpoints.element_types import ELEMENT_TYPES, READABLE_ELEMENT_TYPES
from hybrid_runtime.checkpoints.file_reading import OpenFile, open_file
from hybrid_runtime.checkpoints.gguf_blocks import BLOCK_FORMATS, BlockFormat
from hybrid_runtime.errors import CheckpointError, UnsupportedModel
from hybrid_runtime.strict_json import shown

CHUNK_BYTES = 8 << 20
# Dequantising makes float32 of 7 to 12 times the bytes, with temporaries as large: a smaller chunk keeps them small.
BLOCK_CHUNK_BYTES = 4 << 20
# The integers that hold a float's bits, and the bits of +Inf, above which there are only NaNs.
FLOAT_BITS = MappingProxyType(
    {
        torch.float16: (np.int16, np.uint16, 0x7C00),
        torch.bfloat16: (np.int16, np.uint16, 0x7F80),
        torch.float32: (np.int32, np.uint32, 0x7F80_0000),
        torch.float64: (np.int64, np.uint64, 0x7FF0_0000_0000_0000),
    }
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies. `shape` is row-major, outermost first, so a matrix is (rows, columns) in both formats."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Span:
    """A run of rows as consecutive storage units: single elements, or blocks of elements that share a scale."""

    shape: tuple[int, ...]
    first_element: int
    unit_elements: int
    unit_bytes: int
    num_units: int
    offset: int


def storage_unit(dtype: str) -> tuple[int, int]:
    """(elements, bytes) of the smallest piece of a tensor that has bytes of its own; `dtype` is a known name."""
    block_format = BLOCK_FORMATS.get(dtype)
    if block_format is not None:
        return block_format.num_elements, block_format.num_bytes
    return 1, ELEMENT_TYPES[dtype].num_bytes


def read_rows(info: TensorInfo, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Rows [start, stop) of the first dimension, all of them by default; a tensor without dimensions is one row.

    Floats and integers keep their dtype; block-quantised types come as float32. A NaN or Inf is refused with the index
    of the first one.
    """
    span = _row_span(info, start, stop)
    with open_file(info.path) as file:
        block_format = BLOCK_FORMATS.get(info.dtype)
        if block_format is not None:
            return _read_blocks(file, info, span, block_format)
        return _read_elements(file, info, span)


def read_raw_rows(info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) as stored: uint8 [rows, bytes per row], for repacking without loss.

    Checked for NaN and Inf like `read_rows`, because a broken scale would otherwise travel into the store.
    """
    span = _row_span(info, start, stop)
    num_rows = stop - start
    if not info.shape or math.prod(info.shape[1:]) % span.unit_elements:
        raise ValueError(
            f"{info.path}: tensor {shown(info.name)} of {info.dtype} and shape {info.shape} has no raw rows"
        )
    row_bytes = math.prod(info.shape[1:]) // span.unit_elements * span.unit_bytes
    raw = torch.empty((num_rows, row_bytes), dtype=torch.uint8)
    chunk_units = max(1, CHUNK_BYTES // span.unit_bytes)
    with open_file(info.path) as file:
        for first, units in _chunks(span.num_units, chunk_units):
            chunk = raw.view(-1)[first * span.unit_bytes : (first + units) * span.unit_bytes]
            file.read_into(chunk.numpy().data, span.offset + first * span.unit_bytes)
            _refuse_nonfinite_raw(chunk, info, span, first)
    return raw


def _row_span(info: TensorInfo, start: int, stop: int | None) -> _Span:
    num_rows = info.shape[0] if info.shape else 1
    stop = num_rows if stop is None else stop
    if not 0 <= start <= stop <= num_rows:
        message = f"{info.path}: rows [{start}, {stop}) of tensor {shown(info.name)} asked for, it has {num_rows}"
        raise ValueError(message)
    row_elements = math.prod(info.shape[1:])
    unit_elements, unit_bytes = storage_unit(info.dtype)
    first_element, num_elements = start * row_elements, (stop - start) * row_elements
    if first_element % unit_elements or num_elements % unit_elements:
        raise ValueError(
            f"{info.path}: rows [{start}, {stop}) of tensor {shown(info.name)} cut a {info.dtype} block; "
            f"ask for multiples of {unit_elements}"
        )
    return _Span(
        shape=(stop - start, *info.shape[1:]) if info.shape else (),
        first_element=first_element,
        unit_elements=unit_elements,
        unit_bytes=unit_bytes,
        num_units=num_elements // unit_elements,
        offset=info.offset + first_element // unit_elements * unit_bytes,
    )


def _chunks(num_units: int, chunk_units: int) -> list[tuple[int, int]]:
    return [(first, min(chunk_units, num_units - first)) for first in range(0, num_units, chunk_units)]


def _read_elements(file: OpenFile, info: TensorInfo, span: _Span) -> torch.Tensor:
    dtype = ELEMENT_TYPES[info.dtype].torch_dtype
    if dtype is None:
        raise UnsupportedModel(
            f"{info.path}: tensor {shown(info.name)} has dtype {info.dtype}, expected one of "
            f"{', '.join(READABLE_ELEMENT_TYPES)}; convert the checkpoint to BF16 first"
        )
    flat = torch.empty(span.num_units, dtype=dtype)
    for first, units in _chunks(span.num_units, CHUNK_BYTES // span.unit_bytes):
        chunk = flat[first : first + units]
        file.read_into(chunk.view(torch.uint8).numpy().data, span.offset + first * span.unit_bytes)
        _refuse_bad_elements(chunk, info, span.first_element + first)
    return flat.view(span.shape)


def _read_blocks(file: OpenFile, info: TensorInfo, span: _Span, block_format: BlockFormat) -> torch.Tensor:
    values = torch.empty((span.num_units, span.unit_elements), dtype=torch.float32)
    chunk_units = BLOCK_CHUNK_BYTES // span.unit_bytes
    buffer = torch.empty((min(chunk_units, span.num_units), span.unit_bytes), dtype=torch.uint8)
    for first, units in _chunks(span.num_units, chunk_units):
        blocks = buffer[:units]
        file.read_into(blocks.view(-1).numpy().data, span.offset + first * span.unit_bytes)
        _refuse_bad_scales(blocks, block_format, info, span.first_element + first * span.unit_elements)
        values[first : first + units] = block_format.dequantize(blocks)
    return values.view(span.shape)


def _refuse_nonfinite_raw(chunk: torch.Tensor, info: TensorInfo, span: _Span, first_unit: int) -> None:
    first_element = span.first_element + first_unit * span.unit_elements
    block_format = BLOCK_FORMATS.get(info.dtype)
    dtype = None if block_format is not None else ELEMENT_TYPES[info.dtype].torch_dtype
    if block_format is not None:
        _refuse_bad_scales(chunk.view(-1, span.unit_bytes), block_format, info, first_element)
    elif dtype is not None:
        _refuse_bad_elements(chunk.view(dtype), info, first_element)


def _refuse_bad_scales(blocks: torch.Tensor, block_format: BlockFormat, info: TensorInfo, first_element: int) -> None:
    # A block's values are finite exactly when its scales are (a scale of Inf times 0 is NaN), so only they are checked.
    scales = block_format.scales(blocks)
    if not _all_finite(scales):
        bad = int((~torch.isfinite(scales)).any(dim=1).nonzero()[0])
        _raise_bad_element(info, first_element + bad * block_format.num_elements, "the block's scale is NaN or Inf")


def _refuse_bad_elements(chunk: torch.Tensor, info: TensorInfo, first_element: int) -> None:
    if chunk.dtype == torch.bool:
        bytes_of = chunk.view(torch.uint8)
        if int(bytes_of.max()) > 1:
            _raise_bad_element(info, first_element + int((bytes_of > 1).nonzero()[0]), "expected 0 or 1 as BOOL")
    elif chunk.is_floating_point() and not _all_finite(chunk):
        bad = int((~torch.isfinite(chunk)).nonzero()[0])
        _raise_bad_element(info, first_element + bad, f"found {float(chunk[bad])}, expected a finite number")


def _all_finite(chunk: torch.Tensor) -> bool:
    """Whether no element of a float tensor is NaN or Inf, by two maxima over its bits.

    As signed integers the positive non-finite numbers are the largest of all; as unsigned ones the negative are. Both
    maxima make no temporary and start no thread; isfinite().all() was 20 times slower on bfloat16 (one Zen 3 core).
    """
    signed, unsigned, infinity = FLOAT_BITS[chunk.dtype]
    bits = chunk.contiguous().view(torch.uint8).numpy()
    negative_infinity = infinity | 1 << (8 * chunk.element_size() - 1)
    return int(bits.view(signed).max()) < infinity and int(bits.view(unsigned).max()) < negative_infinity


def _raise_bad_element(info: TensorInfo, element: int, what: str) -> None:
    index = []
    for size in reversed(info.shape):
        element, position = divmod(element, size)
        index.append(position)
    raise CheckpointError(
        f"{info.path}: tensor {shown(info.name)}, element {tuple(reversed(index))}: {what}; "
        "the file is damaged or was exported from a diverged model: fetch it again"
    )
