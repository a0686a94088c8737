"""What text a piece of a tokenizer.json vocabulary stands for.

tokenizers can only decode a whole list of ids, and what it gives for a list is not always what it gives for a longer
one cut short. A stream needs the bytes of one piece, so the two decoders that language models use are read here:
byte-level (each character of a piece is one byte) and the sentencepiece kind (a mark for the space, `<0xNN>` for a
byte). Others are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from hybrid_runtime.errors import TokenizerError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_KNOWN = "ByteLevel, Metaspace, or a Sequence of Replace, ByteFallback, Fuse and Strip"


@dataclass(frozen=True, slots=True)
class PieceDecoder:
    """How a piece becomes bytes: either `byte_level`, or replacements and then perhaps `<0xNN>` bytes."""

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_first_space: bool = False

    def bytes_of(self, piece: str) -> bytes:
        """UTF-8 bytes of one piece; a piece that is no byte-level text stands for itself."""
        if self.byte_level:
            return _byte_level_bytes(piece)
        for mark, text in self.replacements:
            piece = piece.replace(mark, text)
        if self.byte_fallback and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        return piece.encode()


def read_piece_decoder(decoder: object, *, file: str) -> PieceDecoder:
    """The decoder of a tokenizer.json, as far as language models use it."""
    steps = list(_steps(decoder, file=file))
    kinds = {str(step.get("type")) for step in steps}
    if kinds == {"ByteLevel"}:
        return PieceDecoder(byte_level=True)
    if not steps or not kinds <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        raise TokenizerError(f"{file}: decoder: found {', '.join(sorted(kinds)) or 'none'}; known are {_KNOWN}")
    return PieceDecoder(
        replacements=tuple(_replacement(step, file=file) for step in steps if step["type"] in {"Metaspace", "Replace"}),
        byte_fallback="ByteFallback" in kinds,
        strip_first_space=any(_strips_first_space(step, file=file) for step in steps),
    )


def _steps(decoder: object, *, file: str) -> Iterable[Mapping[str, object]]:
    if decoder is None:
        return
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{file}: decoder: found {type(decoder).__name__}; expected an object")
    if decoder.get("type") != "Sequence":
        yield decoder
        return
    for step in decoder.get("decoders", []):
        yield from _steps(step, file=file)


def _replacement(step: Mapping[str, object], *, file: str) -> tuple[str, str]:
    if step["type"] == "Metaspace":
        return str(step.get("replacement", "▁")), " "
    pattern, content = step.get("pattern"), step.get("content")
    mark = pattern.get("String") if isinstance(pattern, dict) else None
    if not isinstance(mark, str) or not isinstance(content, str):
        raise TokenizerError(f"{file}: decoder: Replace with pattern {pattern!r}; only a plain String is known")
    return mark, content


def _strips_first_space(step: Mapping[str, object], *, file: str) -> bool:
    if step["type"] == "Metaspace":
        return step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True) is not False
    if step["type"] != "Strip":
        return False
    if (step.get("content"), step.get("start"), step.get("stop")) != (" ", 1, 0):
        raise TokenizerError(f"{file}: decoder: Strip with {dict(step)}; only one space at the start is known")
    return True


def _byte_level_bytes(piece: str) -> bytes:
    byte_of = byte_of_character()
    if all(character in byte_of for character in piece):
        return bytes(byte_of[character] for character in piece)
    return piece.encode()


@cache
def byte_of_character() -> Mapping[str, int]:
    """The byte-level alphabet: printable Latin-1 bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + idx): byte for idx, byte in enumerate(others)}
