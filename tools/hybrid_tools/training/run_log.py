"""log.jsonl: one line a step and one a test on held-out text. A resumed run cuts off what came after its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

LOG_FILE = "log.jsonl"


class RunLog:
    """Appends whole lines; what a kill cut short is no line."""

    def __init__(self, path: Path, num_steps_done: int) -> None:
        kept = [line for line in read_log(path) if line["step"] <= num_steps_done]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.rename(path)
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


def read_log(path: Path) -> Iterator[dict[str, float]]:
    """Every whole line of a run's log; nothing where there is none."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            return  # the line that a kill cut short is the last
        yield values
