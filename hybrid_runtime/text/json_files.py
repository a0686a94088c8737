"""Reads the JSON files around a tokenizer, with errors that name the file and the field."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from hybrid_runtime.errors import TokenizerError


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

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        content = dict(pairs)
        if len(content) != len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise TokenizerError(f"{file}: the key {twice!r} is given twice in one object; keep one of them")
        return content

    try:
        content = json.loads(data.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file}: not valid JSON: {error}; fetch the file again") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{file}: expected a JSON object, found {type(content).__name__}; fetch the file again")
    return content


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
