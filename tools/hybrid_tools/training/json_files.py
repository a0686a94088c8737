"""The small files that say what a run is: written whole, and named with a remedy when they cannot be read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from hybrid_runtime.errors import CheckpointError
from hybrid_runtime.strict_json import parse_json_object
from hybrid_runtime.whole_files import write_whole

MAX_VALUES = 1 << 27  # an index has a length a document


def write_json(path: Path, values: Mapping[str, object], indent: int | None = 1) -> None:
    """Replace path in one step, and only when the disk has all of it."""
    write_whole(path, (json.dumps(values, indent=indent) + "\n").encode())


def read_json(path: Path, keys: tuple[str, ...], remade: Path | None = None) -> dict[str, object]:
    """The object in path. Raise CheckpointError when it is not there, or not one that has these keys.

    remade: what the next run makes again when it is not there, path itself by default.
    """
    remedy = remedy_for(remade or path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing; {remedy}") from error
    values = parse_json_object(data, str(path), max_values=MAX_VALUES, remedy=remedy)
    missing = [key for key in keys if key not in values]
    if missing:
        raise CheckpointError(f"{path}: lacks {', '.join(missing)}, it is not hybrid-train's; {remedy}")
    return values


def remedy_for(remade: Path) -> str:
    """How every message about a file that the next run makes again ends."""
    return f"remove {remade}, and the same command makes it again"
