"""The key-value part of a GGUF header: thirteen value types, arrays of them and arrays of arrays.

Numbers come as Python ints, floats and bools, strings as str, arrays as tuples. What a key means is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from hybrid_runtime.checkpoints.gguf_header import HeaderReader
from hybrid_runtime.errors import CheckpointError
from hybrid_runtime.strict_json import shown

BOOL, STRING, ARRAY = 7, 8, 9
NUMBER_TYPES: Mapping[int, np.dtype[np.generic]] = MappingProxyType(
    {
        0: np.dtype("<u1"),
        1: np.dtype("<i1"),
        2: np.dtype("<u2"),
        3: np.dtype("<i2"),
        4: np.dtype("<u4"),
        5: np.dtype("<i4"),
        6: np.dtype("<f4"),
        10: np.dtype("<u8"),
        11: np.dtype("<i8"),
        12: np.dtype("<f8"),
    }
)
MAX_KEYS = 1 << 16
MAX_KEY_BYTES = (1 << 16) - 1
# All arrays of a file together; the largest published vocabularies need 1.4 million.
MAX_ARRAY_ELEMENTS = 1 << 22
MAX_ARRAY_DEPTH = 4
# The least that each takes in the file: a key is its length, one letter, a type and one byte of value.
MIN_KEY_BYTES = 8 + 1 + 4 + 1
MIN_STRING_BYTES = 8
MIN_ARRAY_BYTES = 4 + 8


def read_metadata(reader: HeaderReader, num_keys: int) -> dict[str, object]:
    """The next `num_keys` keys and their values, in the file's order."""
    values = _ValueReader(reader)
    metadata: dict[str, object] = {}
    for index in range(num_keys):
        key = reader.string(f"metadata key {index}", limit=MAX_KEY_BYTES)
        if not key or key in metadata:
            fault = "twice, expected once" if key else "without a name"
            raise CheckpointError(f"{reader.path}: metadata key {index} {shown(key)} is there {fault}; fetch it again")
        metadata[key] = values.read(reader.uint32(f"type of {shown(key)}"), shown(key))
    return metadata


class _ValueReader:
    """Reads values, and counts down the array elements that the file may still hold."""

    def __init__(self, reader: HeaderReader) -> None:
        self._reader = reader
        self._elements_left = MAX_ARRAY_ELEMENTS

    def read(self, value_type: int, field: str) -> object:
        if value_type == STRING:
            return self._reader.string(field)
        if value_type == ARRAY:
            return self._array(field, depth=1)
        return self._numbers(value_type, 1, field)[0]

    def _array(self, field: str, depth: int) -> tuple[object, ...]:
        if depth > MAX_ARRAY_DEPTH:
            raise CheckpointError(
                f"{self._reader.path}: {field} nests arrays more than {MAX_ARRAY_DEPTH} deep; not a model file"
            )
        item_type = self._reader.uint32(f"element type of {field}")
        count = self._reader.count(f"length of {field}", self._item_bytes(item_type, field), self._elements_left)
        self._elements_left -= count
        if item_type == STRING:
            return self._reader.strings(count, field)
        if item_type == ARRAY:
            return tuple(self._array(f"{field}[{index}]", depth + 1) for index in range(count))
        return self._numbers(item_type, count, field)

    def _item_bytes(self, item_type: int, field: str) -> int:
        if item_type == STRING:
            return MIN_STRING_BYTES
        if item_type == ARRAY:
            return MIN_ARRAY_BYTES
        return self._number_type(item_type, field).itemsize

    def _numbers(self, item_type: int, count: int, field: str) -> tuple[object, ...]:
        dtype = self._number_type(item_type, field)
        numbers = np.frombuffer(self._reader.take(count * dtype.itemsize, field), dtype=dtype)
        if item_type != BOOL:
            return tuple(numbers.tolist())
        if count and numbers.max() > np.uint8(1):
            raise CheckpointError(
                f"{self._reader.path}: {field} holds the truth value {numbers.max()}, expected 0 or 1; fetch it again"
            )
        return tuple(numbers.astype(np.bool_).tolist())

    def _number_type(self, value_type: int, field: str) -> np.dtype[np.generic]:
        dtype = NUMBER_TYPES.get(0 if value_type == BOOL else value_type)
        if dtype is None:
            raise CheckpointError(
                f"{self._reader.path}: {field} has value type {value_type}, expected 0 to 12; "
                "the file is damaged or newer than this runtime"
            )
        return dtype
