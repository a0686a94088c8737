"""--trace: what the kernels did in the first few tokens, as a file that chrome://tracing and ui.perfetto.dev show."""

from __future__ import annotations

import json
from pathlib import Path

from hybrid_runtime.engine import Engine
from hybrid_runtime.generation.meter import GPU_LABELS
from hybrid_runtime.whole_files import write_whole

NUM_TOKENS = 8
LANES = {"CPU": 1, "GPU": 2}


class TraceRecorder:
    """Collects after each token; writes when it has NUM_TOKENS, or at the end."""

    def __init__(self, engine: Engine, path: Path) -> None:
        self._engine = engine
        self._path = path
        self._events: list[dict[str, object]] = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": lane, "args": {"name": name}}
            for name, lane in LANES.items()
        ]
        self._seen = engine.sequence.decoder.steps
        self._num_tokens = 0

    def look(self) -> None:
        """Take the last token's times, unless it was taken, or there are enough."""
        decoder = self._engine.sequence.decoder
        if self._num_tokens >= NUM_TOKENS or decoder.steps == self._seen:
            return
        self._seen = decoder.steps
        self._num_tokens += 1
        program = decoder.program_of(self._engine.sequence.cache)
        per_tick_us = 1e6 * decoder.step_s / max(1, sum(program.ticks_by_label().values()))
        for idx, (label, start, ticks) in enumerate(program.timeline()):
            lane = LANES["GPU" if label in GPU_LABELS else "CPU"]
            self._events.append(
                {
                    "ph": "X",
                    "name": label,
                    "cat": f"token {self._num_tokens}",
                    "pid": 1,
                    "tid": lane,
                    "ts": start * per_tick_us,
                    "dur": ticks * per_tick_us,
                    "args": {"operation": idx, "token": self._num_tokens},
                }
            )

    def write(self) -> None:
        """May raise OSError."""
        write_whole(self._path, json.dumps({"traceEvents": self._events, "displayTimeUnit": "ms"}).encode())
