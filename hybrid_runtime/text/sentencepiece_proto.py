"""Writes the few fields of sentencepiece's ModelProto that a vocabulary from a GGUF file fills.

sentencepiece's own message classes need the protobuf package, which nothing else here does. The wire format is a run
of (field number, wire type, value); the field numbers are those of sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

_VARINT, _LENGTH_DELIMITED, _FIXED32 = 0, 2, 5
_BPE = 2  # TrainerSpec.ModelType

_PIECES, _TRAINER_SPEC, _NORMALIZER_SPEC = 1, 2, 3  # fields of ModelProto


class PieceType(IntEnum):
    """What a piece is for; GGUF's tokenizer.ggml.token_type uses the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of a sentencepiece vocabulary."""

    text: str
    score: float
    type: PieceType


def bpe_model_proto(pieces: Iterable[Piece], *, byte_fallback: bool, add_dummy_prefix: bool) -> bytes:
    """A BPE model over `pieces` that leaves the text as it is, apart from the space that `add_dummy_prefix` adds."""
    trainer_spec = _integer(3, _BPE) + _integer(35, int(byte_fallback))
    # remove_extra_whitespaces off: every space of the prompt counts
    normalizer_spec = _text(1, "identity") + _integer(3, int(add_dummy_prefix)) + _integer(4, 0) + _integer(5, 1)
    body = b"".join(_message(_PIECES, _piece(piece)) for piece in pieces)
    return body + _message(_TRAINER_SPEC, trainer_spec) + _message(_NORMALIZER_SPEC, normalizer_spec)


def without_dummy_prefix(model_proto: bytes) -> bytes:
    """The same model, which puts no space before a text: protobuf merges a message that is given a second time."""
    return model_proto + _message(_NORMALIZER_SPEC, _integer(3, 0))


def _piece(piece: Piece) -> bytes:
    return _text(1, piece.text) + _key(2, _FIXED32) + struct.pack("<f", piece.score) + _integer(3, piece.type)


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())


def _message(field: int, value: bytes) -> bytes:
    return _key(field, _LENGTH_DELIMITED) + _varint(len(value)) + value


def _integer(field: int, value: int) -> bytes:
    return _key(field, _VARINT) + _varint(value)


def _key(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)
