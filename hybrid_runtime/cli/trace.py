"""--trace: what the kernels did in the first few tokens, as a file that chrome://tracing and ui.perfetto.dev show."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from hybrid_runtime.engine import Engine
from hybrid_runtime.errors import UsageError
from hybrid_runtime.generation.meter import GPU_LABELS
from hybrid_runtime.whole_files import write_whole

NUM_TOKENS = 8
LANES = {"CPU": 1, "GPU": 2}


@dataclass(frozen=True, slots=True)
class _Token:
    """timeline: in ticks of the program's clock."""

    timeline: list[tuple[str, int, int]]
    step_s: float


class TraceRecorder:
    """Collects after each token; writes when it has NUM_TOKENS, or at the end."""

    def __init__(self, engine: Engine, path: Path) -> None:
        self._engine = engine
        self._path = path
        self._tokens: list[_Token] = []
        decoder = engine.sequence.decoder
        self._seen, self._seen_s = decoder.steps, decoder.step_s

    def look(self) -> None:
        """Take the last token's times, unless it was taken, or there are enough."""
        decoder = self._engine.sequence.decoder
        if len(self._tokens) >= NUM_TOKENS or decoder.steps == self._seen:
            return
        step_s = (decoder.step_s - self._seen_s) / (decoder.steps - self._seen)
        self._seen, self._seen_s = decoder.steps, decoder.step_s
        self._tokens.append(_Token(decoder.program_of(self._engine.sequence.cache).timeline(), step_s))

    def write(self) -> None:
        """May raise OSError. What is no file, such as a pipe, is written to; what a link names is written."""
        data = json.dumps({"traceEvents": self._events(), "displayTimeUnit": "ms"}).encode()
        path = self._path.resolve()
        if path.exists() and not path.is_file():
            path.write_bytes(data)
        else:
            write_whole(path, data)

    def _events(self) -> list[dict[str, object]]:
        """One clock for all tokens, which begins with the first."""
        events: list[dict[str, object]] = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": lane, "args": {"name": name}}
            for name, lane in LANES.items()
        ]
        spans = [_ticks(token.timeline) for token in self._tokens]
        per_tick_us = 1e6 * sum(token.step_s for token in self._tokens) / max(1, sum(spans))
        begin = self._tokens[0].timeline[0][1] if self._tokens and self._tokens[0].timeline else 0
        for number, token in enumerate(self._tokens, 1):
            for idx, (label, start, ticks) in enumerate(token.timeline):
                event: dict[str, object] = {"ph": "X", "name": label, "cat": f"token {number}", "pid": 1}
                event |= {"tid": LANES["GPU" if label in GPU_LABELS else "CPU"], "ts": (start - begin) * per_tick_us}
                event |= {"dur": ticks * per_tick_us, "args": {"operation": idx, "token": number}}
                events.append(event)
        return events


def _ticks(timeline: list[tuple[str, int, int]]) -> int:
    """From the first operation's beginning to the last one's end."""
    return timeline[-1][1] + timeline[-1][2] - timeline[0][1] if timeline else 0


def require_writable(path: Path) -> None:
    """Raise UsageError for a trace that has no folder to go to, before anything is computed."""
    if not path.resolve().parent.is_dir() or path.is_dir():
        raise UsageError(f"--trace {path}: is a folder, or is in none; name a file in a folder that is there")
