"""Reads the JSON files around a tokenizer, with errors that name the file and the field."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hybrid_runtime import strict_json
from hybrid_runtime.errors import TokenizerError

MAX_VALUES = 1 << 23  # a tokenizer.json of 256k tokens lists them and twice as many merged pieces


def read_bytes(path: Path) -> bytes:
    """A file's bytes, or a TokenizerError that says why there are none."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}; check the path and the permissions") from error


def read_json_object(path: Path) -> Mapping[str, object]:
    """The JSON object in a file; an absent file is an empty object."""
    return parse_json_object(read_bytes(path), file=str(path)) if path.is_file() else {}


def parse_json_object(data: bytes, *, file: str) -> dict[str, object]:
    """The JSON object in `data`; a key given twice is refused, because readers differ in which one they take."""
    return strict_json.parse_json_object(data, file, TokenizerError, max_values=MAX_VALUES)


def text_field(content: Mapping[str, object], key: str, *, file: str) -> str | None:
    """A token's name: a string, an object with `content`, or nothing."""
    value = content.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is None or isinstance(value, str):
        return value
    raise TokenizerError(f"{file}: {key}: found {value!r}; expected a string or an object with content")


def flag_field(content: Mapping[str, object], key: str, *, file: str) -> bool | None:
    """A true or false, or nothing."""
    value = content.get(key)
    if value is None or isinstance(value, bool):
        return value
    raise TokenizerError(f"{file}: {key}: found {value!r}; expected true or false")


def ids_field(content: Mapping[str, object], key: str, *, file: str) -> tuple[int, ...]:
    """One id or a list of them; nothing is no id."""
    value = content.get(key)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    for token_id in ids:
        if type(token_id) is not int:
            raise TokenizerError(f"{file}: {key}: found {token_id!r}; expected a token id or a list of token ids")
    return tuple(ids)
