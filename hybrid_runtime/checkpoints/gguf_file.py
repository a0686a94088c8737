"""A GGUF file: metadata and tensors of versions 2 and 3, little-endian, whole or split in parts.

Also PowerInfer's files, which are GGUF with the magic `PWRI`. The header is parsed by our own code because the `gguf`
package maps the file and, on hostile ones, hangs or fails with whatever error comes first; here each count is checked
against the file before use. Like llama.cpp, the tensors must follow one another without overlap or hole; unlike it,
their order may differ from the header's. Bytes after the last tensor are ignored, as they are there.

What the keys and tensor names mean is not known here; tensor bytes are read by `tensor_file.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hybrid_runtime.checkpoints.file_reading import open_file
from hybrid_runtime.checkpoints.gguf_header import HeaderReader
from hybrid_runtime.checkpoints.gguf_metadata import MAX_KEYS, MIN_KEY_BYTES, read_metadata
from hybrid_runtime.checkpoints.gguf_types import (
    PLAIN_MAGIC,
    POWERINFER_MAGIC,
    READABLE_TYPES,
    readable_type,
    type_in_words,
)
from hybrid_runtime.checkpoints.tensor_file import TensorInfo, storage_unit
from hybrid_runtime.errors import CheckpointError, UnsupportedModel
from hybrid_runtime.strict_json import shown

VERSIONS = (2, 3)
OLD_MAGICS = (b"ggml", b"lmgg", b"fmgg", b"tjgg", b"algg")  # formats before GGUF, as their bytes lie in the file
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_TENSORS = 1 << 17
MAX_TENSOR_NAME_BYTES = 256
MAX_DIMENSIONS = 4
MIN_TENSOR_BYTES = 8 + 4 + 4 + 8  # name length, dimension count, type, offset
PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
RECONVERT = "convert the model again with llama.cpp's current convert_hf_to_gguf.py"


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What a GGUF file holds; of a split one, `path`, `version` and `alignment` are the first part's."""

    path: Path
    version: int
    magic: str
    metadata: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]
    alignment: int


def open_gguf(path: Path) -> GgufFile:
    """The file at `path`; given any part of a split model, all of its parts as one."""
    part = _read_part(path)
    num_parts = part.metadata.get("split.count", 1)
    name = PART_NAME.fullmatch(path.name)
    # a merged model keeps the key, with the value 0
    if num_parts in (0, 1) and (name is None or int(name["count"]) == 1):
        return part
    if name is None or num_parts != int(name["count"]):
        raise CheckpointError(
            f"{path}: split.count is {shown(num_parts)}, the file name says {name['count'] if name else 'no part'}; "
            "give the parts the names NAME-00001-of-0000N.gguf that llama-gguf-split made"
        )
    return _join_parts(path.parent, name["stem"], int(name["count"]))


def _read_part(path: Path) -> GgufFile:
    with open_file(path) as file:
        reader = HeaderReader(file)
        magic = _read_magic(reader)
        version = _read_version(reader)
        num_tensors = reader.count("tensor count", MIN_TENSOR_BYTES, MAX_TENSORS)
        num_keys = reader.count("metadata count", MIN_KEY_BYTES, MAX_KEYS)
        metadata = read_metadata(reader, num_keys)
        alignment = _alignment(path, metadata)
        entries = [_read_tensor(reader, index, magic) for index in range(num_tensors)]
        data_start = _aligned(reader.position, alignment)
        data_bytes = max(0, file.num_bytes - data_start)
    _check_layout(path, entries, alignment, data_bytes)
    tensors = {
        entry.name: TensorInfo(entry.name, entry.dtype, entry.shape, path, data_start + entry.offset, entry.num_bytes)
        for entry in entries
    }
    return GgufFile(path, version, magic, metadata, tensors, alignment)


def _read_magic(reader: HeaderReader) -> str:
    magic = reader.take(4, "magic")
    if magic in OLD_MAGICS:
        raise CheckpointError(f"{reader.path}: magic is {magic!r}, a format before GGUF, expected GGUF; {RECONVERT}")
    if magic not in (PLAIN_MAGIC.encode(), POWERINFER_MAGIC.encode()):
        raise CheckpointError(
            f"{reader.path}: magic is {magic!r}, expected {PLAIN_MAGIC} or {POWERINFER_MAGIC}; not a GGUF file"
        )
    return magic.decode()


def _read_version(reader: HeaderReader) -> int:
    version = reader.uint32("version")
    if version in VERSIONS:
        return version
    if version == 1:
        raise CheckpointError(
            f"{reader.path}: version 1 of GGUF (2023, with 32-bit counts), expected version 2 or 3; {RECONVERT}"
        )
    if version and version & 0xFFFF == 0:
        raise CheckpointError(
            f"{reader.path}: version is {version:#x}: the file is big-endian, expected little-endian; "
            "convert it with `gguf-convert-endian FILE little` of the gguf package"
        )
    raise CheckpointError(f"{reader.path}: version {version} of GGUF, expected version 2 or 3; {RECONVERT}")


def _alignment(path: Path, metadata: Mapping[str, object]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    is_power_of_two = type(alignment) is int and alignment > 0 and alignment & (alignment - 1) == 0
    if not is_power_of_two or not isinstance(alignment, int) or alignment > MAX_ALIGNMENT:
        raise CheckpointError(
            f"{path}: general.alignment is {shown(alignment)}, expected a power of two up to {MAX_ALIGNMENT}; "
            "the file is damaged: fetch it again"
        )
    return alignment


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


@dataclass(frozen=True, slots=True)
class _Entry:
    """One line of the tensor table; `offset` counts from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def _read_tensor(reader: HeaderReader, index: int, magic: str) -> _Entry:
    name = reader.string(f"name of tensor {index}", limit=MAX_TENSOR_NAME_BYTES)
    if not name:
        raise CheckpointError(f"{reader.path}: tensor {index} has no name; the file is damaged: fetch it again")
    where = f"tensor {shown(name)}"
    num_dimensions = reader.uint32(f"dimension count of {where}")
    if num_dimensions > MAX_DIMENSIONS:
        raise CheckpointError(
            f"{reader.path}: {where} has {num_dimensions} dimensions, expected at most {MAX_DIMENSIONS}; fetch it again"
        )
    dimensions = [reader.uint64(f"dimension {axis} of {where}") for axis in range(num_dimensions)]
    if 0 in dimensions:
        raise CheckpointError(
            f"{reader.path}: {where} has dimensions {dimensions}, expected none to be 0; fetch it again"
        )
    dtype = _read_type(reader, where, magic)
    row_elements = dimensions[0] if dimensions else 1
    unit_elements, unit_bytes = storage_unit(dtype)
    if row_elements % unit_elements:
        raise CheckpointError(
            f"{reader.path}: {where} has rows of {row_elements}, expected a multiple of {dtype}'s block of "
            f"{unit_elements}; the file is damaged: fetch it again"
        )
    num_bytes = math.prod(dimensions) // unit_elements * unit_bytes
    offset = reader.uint64(f"offset of {where}")
    if num_bytes > reader.remaining or offset > reader.remaining - num_bytes:
        raise CheckpointError(
            f"{reader.path}: {where} of dimensions {dimensions} and {dtype} needs {num_bytes} bytes at data offset "
            f"{offset}, the file has {reader.remaining} left; it is cut short or damaged: fetch it again"
        )
    return _Entry(name, dtype, tuple(reversed(dimensions)), offset, num_bytes)


def _read_type(reader: HeaderReader, where: str, magic: str) -> str:
    number = reader.uint32(f"type of {where}")
    dtype = readable_type(number, magic)
    if dtype is None:
        readable = ", ".join(READABLE_TYPES.values())
        raise UnsupportedModel(
            f"{reader.path}: {where} has type {type_in_words(number)}, expected one of {readable}; "
            "quantise the model to one of these, such as Q4_K_M"
        )
    return dtype


def _check_layout(path: Path, entries: list[_Entry], alignment: int, data_bytes: int) -> None:
    """Names must differ, and the tensors, sorted by offset, must follow one another at the next aligned byte."""
    names: set[str] = set()
    for entry in entries:
        if entry.name in names:
            raise CheckpointError(f"{path}: tensor {shown(entry.name)} is there twice, expected once; fetch it again")
        names.add(entry.name)
    end, previous = 0, "the start of the data"
    for entry in sorted(entries, key=lambda entry: entry.offset):
        where = f"{path}: tensor {shown(entry.name)}"
        if entry.offset % alignment:
            raise CheckpointError(
                f"{where} has offset {entry.offset}, expected a multiple of the alignment {alignment}; fetch it again"
            )
        expected = _aligned(end, alignment)
        if entry.offset != expected:
            fault = "overlaps" if entry.offset < expected else "leaves a hole after"
            raise CheckpointError(
                f"{where} has offset {entry.offset} and {fault} {previous}, expected offset {expected}; "
                "the file is damaged: fetch it again"
            )
        end, previous = entry.offset + entry.num_bytes, f"tensor {shown(entry.name)}"
    if end > data_bytes:
        raise CheckpointError(
            f"{path}: {previous} ends at data offset {end}, the file has {data_bytes} bytes of data; "
            "it is cut short: fetch it again"
        )


def _join_parts(folder: Path, stem: str, num_parts: int) -> GgufFile:
    """All parts of a split model, which must be there, be no others, and together hold what the first one promises."""
    names = [f"{stem}-{number:05d}-of-{num_parts:05d}.gguf" for number in range(1, num_parts + 1)]
    _check_part_names(folder, stem, names)
    parts = [_read_part(folder / name) for name in names]
    first = parts[0]
    tensors: dict[str, TensorInfo] = {}
    for number, part in enumerate(parts):
        _check_part(first, part, number, num_parts)
        for name, info in part.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{part.path}: tensor {shown(name)} is also in {tensors[name].path.name}, expected in one part; "
                    "the parts are of different models: fetch them again"
                )
            tensors[name] = info
    promised = first.metadata.get("split.tensors.count", len(tensors))
    if promised != len(tensors):
        raise CheckpointError(
            f"{first.path}: split.tensors.count is {shown(promised)}, the parts hold {len(tensors)}; fetch them again"
        )
    return GgufFile(first.path, first.version, first.magic, first.metadata, tensors, first.alignment)


def _check_part_names(folder: Path, stem: str, names: list[str]) -> None:
    try:
        found = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed: {error.strerror}; check its rights") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise CheckpointError(
            f"{folder}: part {shown(missing[0])} of a split model is missing ({len(missing)} of {len(names)} are); "
            "finish the download"
        )
    expected = set(names)
    for name in sorted(found - expected):
        part = PART_NAME.fullmatch(name)
        if part is not None and part["stem"] == stem:
            raise CheckpointError(
                f"{folder}: {shown(name)} is not one of the {len(names)} parts {shown(names[0])} and on; "
                "remove what another split left"
            )


def _check_part(first: GgufFile, part: GgufFile, number: int, num_parts: int) -> None:
    expected: dict[str, object] = {key: first.metadata.get(key, value) for key, value in part.metadata.items()}
    expected |= {"split.no": number, "split.count": num_parts}
    for key, value in expected.items():
        if part.metadata.get(key) != value:
            raise CheckpointError(
                f"{part.path}: {shown(key)} is {shown(part.metadata.get(key))}, expected {shown(value)} as in "
                f"{first.path.name}; the parts are of different models: fetch them again"
            )
    if part.magic != first.magic:
        raise CheckpointError(f"{part.path}: magic is {part.magic}, expected {first.magic} as in {first.path.name}")
