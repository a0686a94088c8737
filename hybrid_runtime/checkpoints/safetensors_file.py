"""The header of one safetensors file, read strictly.

Why not the `safetensors` library: it accepts duplicate keys, where the last one silently wins, and it maps the file,
while the converter has promised a peak of resident memory. The format is small, so nothing is lost: eight bytes of
little-endian length, a JSON object `{name: {dtype, shape, data_offsets}}` that may be padded with blanks, and the data,
which the tensors must cover without gap, overlap or rest, so that every byte of the file has exactly one meaning.

Tensor bytes are read by `tensor_file.py`; models split over several shards are `safetensors_folder.py`'s.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypeGuard

from hybrid_runtime.checkpoints.element_types import ELEMENT_TYPES
from hybrid_runtime.checkpoints.file_reading import OpenFile, open_file
from hybrid_runtime.checkpoints.tensor_file import TensorInfo
from hybrid_runtime.errors import CheckpointError, UnsupportedModel
from hybrid_runtime.strict_json import parse_json_object, shown

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 16
MAX_COUNT = (1 << 63) - 1  # the format counts in 64 bits
ENTRY_FIELDS = {"dtype", "shape", "data_offsets"}


def read_safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of the file, in the header's order; a file that contradicts itself anywhere is refused."""
    with open_file(path) as file:
        header_bytes = _header_length(file)
        text = file.read(LENGTH_BYTES, header_bytes)
        data_start = LENGTH_BYTES + header_bytes
        data_bytes = file.num_bytes - data_start
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: header starts with {text[:8]!r}, expected '{{'; not a safetensors file")
    header = parse_json_object(text, f"{path}: header")
    _check_metadata(path, header.pop("__metadata__", {}))
    tensors = {name: _tensor(path, name, entry, data_start, data_bytes) for name, entry in header.items()}
    _check_coverage(path, tensors, data_start, data_bytes)
    return tensors


def _header_length(file: OpenFile) -> int:
    if file.num_bytes < LENGTH_BYTES:
        raise CheckpointError(
            f"{file.path}: header length needs 8 bytes, the file has {file.num_bytes}; it is cut short: fetch it again"
        )
    header_bytes = int.from_bytes(file.read(0, LENGTH_BYTES), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file.path}: header length is {header_bytes}, expected at most {MAX_HEADER_BYTES}; not a safetensors file"
        )
    if header_bytes > file.num_bytes - LENGTH_BYTES:
        raise CheckpointError(
            f"{file.path}: header length is {header_bytes}, {file.num_bytes - LENGTH_BYTES} bytes follow it; "
            "the file is cut short: fetch it again"
        )
    return header_bytes


def _check_metadata(path: Path, metadata: object) -> None:
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ is a {type(metadata).__name__}, expected an object of strings")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise CheckpointError(
                f"{path}: __metadata__ {shown(key)} is a {type(value).__name__}, expected a string; save the file again"
            )


def _tensor(path: Path, name: str, entry: object, data_start: int, data_bytes: int) -> TensorInfo:
    """One header entry, checked by itself."""
    where = f"{path}: tensor {shown(name)}"
    if not _is_unicode(name):
        raise CheckpointError(f"{where} has a name that is no Unicode text; the file is damaged: fetch it again")
    if not isinstance(entry, dict) or set(entry) != ENTRY_FIELDS:
        found = sorted(entry) if isinstance(entry, dict) else [type(entry).__name__]
        raise CheckpointError(
            f"{where} has fields {', '.join(shown(field) for field in found[:5])}, "
            "expected data_offsets, dtype and shape; save the file again with safetensors"
        )
    dtype = entry["dtype"]
    if not isinstance(dtype, str):
        raise CheckpointError(f"{where}: dtype is a {type(dtype).__name__}, expected a string")
    if dtype not in ELEMENT_TYPES:
        known = ", ".join(ELEMENT_TYPES)
        raise UnsupportedModel(f"{where}: dtype {shown(dtype)} is unknown, expected one of {known}; convert it to BF16")
    shape = _counts(entry["shape"], f"{where}: shape")
    if len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{where}: shape has {len(shape)} dimensions, expected at most {MAX_DIMENSIONS}")
    begin, end = _offsets(entry["data_offsets"], where, data_bytes)
    num_bytes = math.prod(shape) * ELEMENT_TYPES[dtype].num_bytes
    if num_bytes != end - begin:
        raise CheckpointError(
            f"{where}: data_offsets [{begin}, {end}] span {end - begin} bytes, expected {num_bytes} for {dtype} and "
            f"shape {list(shape)}; the file is damaged: fetch it again"
        )
    return TensorInfo(name=name, dtype=dtype, shape=shape, path=path, offset=data_start + begin, num_bytes=num_bytes)


def _offsets(value: object, where: str, data_bytes: int) -> tuple[int, int]:
    offsets = _counts(value, f"{where}: data_offsets")
    if len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets has {len(offsets)} numbers, expected begin and end")
    begin, end = offsets
    if begin > end:
        raise CheckpointError(f"{where}: data_offsets [{begin}, {end}] end before they begin; fetch the file again")
    if end > data_bytes:
        raise CheckpointError(
            f"{where}: data_offsets end at {end}, the file has {data_bytes} bytes of data; "
            "it is cut short: fetch it again"
        )
    return begin, end


def _counts(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise CheckpointError(f"{where} is a {type(value).__name__}, expected an array of whole numbers")
    for item in value:
        if not _is_count(item):
            raise CheckpointError(f"{where} holds {shown(item)}, expected whole numbers from 0 to 2^63-1")
    return tuple(value)


def _is_count(value: object) -> TypeGuard[int]:
    # bool is a subclass of int, and `true` is not a size
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


def _is_unicode(name: str) -> bool:
    # JSON can spell half of a surrogate pair, which then fails wherever the name is printed or stored
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_coverage(path: Path, tensors: dict[str, TensorInfo], data_start: int, data_bytes: int) -> None:
    """The tensors, sorted by offset, must cover the data exactly: no byte twice, none left out."""
    covered = 0
    previous = "the start of the data"
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.num_bytes)):
        begin = info.offset - data_start
        if begin != covered:
            fault = "overlaps" if begin < covered else "leaves a hole after"
            raise CheckpointError(
                f"{path}: tensor {shown(info.name)} begins at {begin} and {fault} {previous}, which ends at "
                f"{covered}; the file is damaged or made to mislead: fetch it again"
            )
        covered += info.num_bytes
        previous = f"tensor {shown(info.name)}"
    if covered != data_bytes:
        raise CheckpointError(
            f"{path}: {data_bytes - covered} bytes trail after {previous}, which ends the data at {covered}; "
            "the file is damaged or made to mislead: fetch it again"
        )
