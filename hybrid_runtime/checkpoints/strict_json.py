"""JSON objects from files nobody vouches for: duplicate keys, NaN and bombs are refused before they cost anything.

Python's parser keeps the last of two equal keys, which lets one file mean different things to two readers, and builds
whatever nesting it is given. Which keys an object must have is the caller's business.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import NoReturn

from hybrid_runtime.checkpoints.file_reading import shown
from hybrid_runtime.errors import CheckpointError

# Each value of a document needs one of these characters, so counting them bounds the memory of the parsed form. The
# largest published header (a tensor needs about 8 of them) stays two orders of magnitude below.
MAX_VALUES = 1 << 21


def parse_json_object(text: bytes, where: str) -> dict[str, object]:
    """The object that `text` holds; `where` opens every error message, as `/path/file: header`."""
    num_values = sum(text.count(mark) for mark in (b"[", b"{", b","))
    if num_values > MAX_VALUES:
        raise CheckpointError(
            f"{where} holds {num_values} JSON values, expected at most {MAX_VALUES}; not a checkpoint"
        )
    try:
        parsed = json.loads(
            text.decode("utf-8"), object_pairs_hook=_without_duplicates(where), parse_constant=_refuse_constant
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{where} is not UTF-8 at byte {error.start}; the file is damaged: fetch it again"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{where} is not JSON: {error}; the file is damaged: fetch it again") from error
    except RecursionError as error:
        raise CheckpointError(f"{where} is nested too deeply to be read; not a checkpoint") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where} is a JSON {type(parsed).__name__}, expected an object; fetch the file again")
    return parsed


def _without_duplicates(where: str) -> Callable[[list[tuple[str, object]]], dict[str, object]]:
    def build(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise CheckpointError(
                f"{where} has key {shown(twice)} twice in one object, expected once: readers would disagree on its "
                "meaning; save the file again"
            )
        return found

    return build


def _refuse_constant(constant: str) -> NoReturn:
    message = f"{constant} is no JSON number"
    raise ValueError(message)
