"""Shows how far a long step has come: bytes done and total, speed, time left.

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


class Progress(Protocol):
    """What a long step tells about itself; one step at a time."""

    def start(self, label: str, total_bytes: int | None) -> None:
        """Begin a step; `total_bytes` is None when nobody knows how long it will be."""

    def advance(self, n: int) -> None:
        """Say that `n` more bytes are done."""

    def done(self) -> None:
        """End the step, finished or not; harmless when none is running."""


class NoProgress:
    """Says nothing: for libraries and tests."""

    def start(self, label: str, total_bytes: int | None) -> None:
        """Ignore the step."""

    def advance(self, n: int) -> None:
        """Ignore the bytes."""

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
        self._total_bytes: int | None = None
        self._done_bytes = 0
        self._started_s = 0.0
        self._printed_s = 0.0

    def start(self, label: str, total_bytes: int | None) -> None:
        """Begin a step and name it, with its size where it is known."""
        self._label = label
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._started_s = self._printed_s = self._clock()
        self._print(label if total_bytes is None else f"{label}: {format_decimal_bytes(total_bytes)}")

    def advance(self, n: int) -> None:
        """Count the bytes, and print when the last line is old enough."""
        self._done_bytes += n
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
        bytes_per_s = self._done_bytes / elapsed_s
        line = f"{self._label}: {format_decimal_bytes(self._done_bytes)}"
        if self._total_bytes:
            line += f" of {format_decimal_bytes(self._total_bytes)} ({100 * self._done_bytes // self._total_bytes} %)"
        line += f", {format_decimal_bytes(bytes_per_s)}/s"
        if self._total_bytes and 0 < self._done_bytes < self._total_bytes:
            return f"{line}, {format_duration((self._total_bytes - self._done_bytes) / bytes_per_s)} left"
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

    def start(self, label: str, total_bytes: int | None) -> None:
        """Begin a step, ending one that is still drawn."""
        from rich.console import Console  # noqa: PLC0415 - imported when something is drawn
        from rich.progress import (  # noqa: PLC0415
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as RichProgress  # noqa: PLC0415

        self.done()
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),  # a file's name is data: [red] in it is not a colour
            BarColumn(bar_width=24),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
        )
        self._bar.start()
        self._task = self._bar.add_task(label, total=total_bytes)

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


def format_duration(seconds: float) -> str:
    """Seconds as a clock shows them: 75 -> '1:15', 3675 -> '1:01:15'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
