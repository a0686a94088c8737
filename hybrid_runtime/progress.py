"""Shows how far a long step has come: bytes (or tokens, ...) done and total, speed, time left.

Downloads and conversions report through the small `Progress` protocol and know nothing of terminals. On a terminal a
`TerminalProgress` draws one moving line on stderr; elsewhere (a log file, a pipe, CI) a `PlainProgress` prints a
whole line at most every five seconds, so that a log of an hour stays readable. stdout is never touched: it belongs to
the generated text.

Once around, per step: `start`, then any number of `advance`, then `done`, which is called on failure too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TextIO

from hybrid_runtime.sizes import format_decimal_bytes

if TYPE_CHECKING:  # rich costs 50 ms to import, and most callers never draw
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

PLAIN_INTERVAL_S = 5.0
BYTES = "bytes"


class Progress(Protocol):
    """What a long step tells about itself; one step at a time."""

    def start(self, label: str, total: int | None, unit: str = BYTES) -> None:
        """Begin a step; `total` is None when nobody knows how long it will be. unit: of what is counted, in plural."""

    def advance(self, n: int) -> None:
        """Say that `n` more are done."""

    def done(self) -> None:
        """End the step, finished or not; harmless when none is running."""


class NoProgress:
    """Says nothing: for libraries and tests."""

    def start(self, label: str, total: int | None, unit: str = BYTES) -> None:
        """Ignore the step."""

    def advance(self, n: int) -> None:
        """Ignore what is done."""

    def done(self) -> None:
        """Ignore the end."""


class PlainProgress:
    """Prints a line at the start, at most one every `interval_s`, and one at the end."""

    def __init__(
        self,
        stream: TextIO,
        *,
        interval_s: float = PLAIN_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._interval_s = interval_s
        self._clock = clock
        self._label: str | None = None
        self._total: int | None = None
        self._unit = BYTES
        self._done = 0
        self._started_s = 0.0
        self._printed_s = 0.0

    def start(self, label: str, total: int | None, unit: str = BYTES) -> None:
        """Begin a step and name it, with its size where it is known."""
        self._label = label
        self._total = total
        self._unit = unit
        self._done = 0
        self._started_s = self._printed_s = self._clock()
        self._print(label if total is None else f"{label}: {_amount(total, unit)}")

    def advance(self, n: int) -> None:
        """Count, and print when the last line is old enough."""
        self._done += n
        now_s = self._clock()
        if self._label is not None and now_s - self._printed_s >= self._interval_s:
            self._printed_s = now_s
            self._print(self._describe(now_s))

    def done(self) -> None:
        """Print where the step ended; a step that failed shows how far it came."""
        if self._label is not None:
            self._print(self._describe(self._clock()))
            self._label = None

    def _describe(self, now_s: float) -> str:
        elapsed_s = max(now_s - self._started_s, 1e-9)
        per_s = self._done / elapsed_s
        line = f"{self._label}: {_amount(self._done, self._unit)}"
        if self._total:
            line += f" of {_amount(self._total, self._unit)} ({100 * self._done // self._total} %)"
        line += f", {_amount(per_s, self._unit)}/s"
        if self._total and 0 < self._done < self._total:
            return f"{line}, {format_duration((self._total - self._done) / per_s)} left"
        return f"{line}, took {format_duration(elapsed_s)}"

    def _print(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class TerminalProgress:
    """Draws one moving line with rich; the line stays when the step ends."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def start(self, label: str, total: int | None, unit: str = BYTES) -> None:
        """Begin a step, ending one that is still drawn."""
        from rich.console import Console  # noqa: PLC0415 - imported when something is drawn
        from rich.progress import (  # noqa: PLC0415
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as RichProgress  # noqa: PLC0415

        self.done()
        amounts = (
            [DownloadColumn(), TransferSpeedColumn()] if unit == BYTES else [MofNCompleteColumn(), TextColumn(unit)]
        )
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),  # a file's name is data: [red] in it is not a colour
            BarColumn(bar_width=24),
            *amounts,
            TimeRemainingColumn(),
            console=Console(file=self._stream),
        )
        self._bar.start()
        self._task = self._bar.add_task(label, total=total)

    def advance(self, n: int) -> None:
        """Move the line."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, n)

    def done(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None


def console_progress(stream: TextIO | None = None) -> Progress:
    """The progress display that suits `stream`, which is stderr unless told."""
    stream = sys.stderr if stream is None else stream
    if stream is None:  # closed by the caller (2>&-)
        return NoProgress()
    return TerminalProgress(stream) if stream.isatty() else PlainProgress(stream)


def _amount(count: float, unit: str) -> str:
    return format_decimal_bytes(count) if unit == BYTES else f"{count:.0f} {unit}"


def format_duration(seconds: float) -> str:
    """Seconds as a clock shows them: 75 -> '1:15', 3675 -> '1:01:15'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
