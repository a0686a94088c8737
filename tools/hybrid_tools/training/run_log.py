"""log.jsonl: one line a step and one a test on held-out text. A resumed run cuts off what came after its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from hybrid_runtime.errors import CheckpointError
from hybrid_runtime.whole_files import write_whole

LOG_FILE = "log.jsonl"


class RunLog:
    """Appends whole lines; what a kill cut short is no line."""

    def __init__(self, path: Path, num_steps_done: int) -> None:
        kept = [line for line in read_log(path) if line["step"] <= num_steps_done]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def add(self, values: Mapping[str, object]) -> None:
        """Write one line; after a power cut the lines since the last checkpoint are trained again anyway."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Write what is left."""
        self._file.close()


def training_seconds(path: Path, num_steps: int) -> float:
    """What the first num_steps steps took, in whatever process."""
    return sum(line.get("seconds", 0.0) for line in read_log(path) if line["step"] <= num_steps)


def read_log(path: Path) -> list[dict[str, float]]:
    """Every line of a run's log; nothing where there is none. What was being written when it was killed is no line.

    Raise CheckpointError for a line that is damaged and has good ones after it: they would be lost in silence.
    """
    lines = path.read_bytes().splitlines() if path.is_file() else []
    parsed = [_parse(line) for line in lines]
    while parsed and parsed[-1] is None:
        parsed.pop()
    if None in parsed:
        raise CheckpointError(
            f"{path}: line {parsed.index(None) + 1} is damaged: {lines[parsed.index(None)][:80]!r}; remove that line, "
            "or the file if the curve so far does not matter"
        )
    return [line for line in parsed if line is not None]


def _parse(line: bytes) -> dict[str, float] | None:
    try:
        values = json.loads(line)
    except ValueError:  # a line that is cut short, or no UTF-8
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None
