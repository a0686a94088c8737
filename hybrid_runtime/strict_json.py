"""JSON objects from files nobody vouches for: duplicate keys, NaN and bombs are refused before they cost anything.

Python's parser keeps the last of two equal keys, which lets one file mean different things to two readers, and builds
whatever nesting it is given. Which keys an object must have is the caller's business.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import NoReturn

from hybrid_runtime.errors import CheckpointError, HybridError

# Each value of a document needs one of these characters, so counting them bounds the memory of the parsed form. The
# largest published header (a tensor needs about 8 of them) stays two orders of magnitude below.
MAX_VALUES = 1 << 21
MAX_SHOWN_CHARS = 80


def parse_json_object(
    text: bytes,
    where: str,
    error: type[HybridError] = CheckpointError,
    *,
    max_values: int = MAX_VALUES,
    remedy: str = "fetch it again",
) -> dict[str, object]:
    """The object that `text` holds, or `error`; `where` opens messages (`/path/file: header`), remedy ends them."""
    num_values = sum(text.count(mark) for mark in (b"[", b"{", b","))
    if num_values > max_values:
        raise error(f"{where} holds {num_values} JSON values, expected at most {max_values}; not such a file")
    try:
        parsed = json.loads(
            text.decode("utf-8"), object_pairs_hook=_without_duplicates(where, error), parse_constant=_refuse_constant
        )
    except UnicodeDecodeError as cause:
        raise error(f"{where} is not UTF-8 at byte {cause.start}; the file is damaged: {remedy}") from cause
    except ValueError as cause:
        raise error(f"{where} is not JSON: {cause}; the file is damaged: {remedy}") from cause
    except RecursionError as cause:
        raise error(f"{where} is nested too deeply to be read; not such a file") from cause
    if not isinstance(parsed, dict):
        raise error(f"{where} is a JSON {type(parsed).__name__}, expected an object; {remedy}")
    return parsed


def _without_duplicates(
    where: str, error: type[HybridError]
) -> Callable[[list[tuple[str, object]]], dict[str, object]]:
    def build(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise error(
                f"{where} has key {shown(twice)} twice in one object, expected once: readers would disagree on its "
                "meaning; save the file again"
            )
        return found

    return build


def _refuse_constant(constant: str) -> NoReturn:
    message = f"{constant} is no JSON number"
    raise ValueError(message)


def shown(value: object) -> str:
    """What a file holds as a message may carry it: quoted, escaped and short, however long or hostile it is."""
    if isinstance(value, list | tuple | dict):
        return f"a {type(value).__name__} of {len(value)}"  # its repr may be as large or as nested as the file
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}... ({len(text)} characters)"
