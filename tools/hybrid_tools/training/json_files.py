"""The small files that say what a run is: written whole and synced, and named when they cannot be read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from hybrid_runtime.errors import CheckpointError


def write_json(path: Path, values: Mapping[str, object], indent: int | None = 1) -> None:
    """Replace path in one step, and only when the disk has all of it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=indent) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def read_json(path: Path, keys: tuple[str, ...], remade: Path | None = None) -> dict[str, object]:
    """The object in path. Raise CheckpointError when it is not one that has these keys.

    remade: what the next run makes again when it is not there, path itself by default.
    """
    remedy = f"remove {remade or path}, and the same command makes it again"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: is damaged: {error}; {remedy}") from error
    missing = [key for key in keys if key not in values] if isinstance(values, dict) else list(keys)
    if missing or not isinstance(values, dict):
        raise CheckpointError(f"{path}: lacks {', '.join(missing) or 'an object'}, it is not hybrid-train's; {remedy}")
    return values
