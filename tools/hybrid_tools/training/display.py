"""What a run shows: on a terminal one moving line, elsewhere a line every few seconds; always on stderr."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

from hybrid_runtime.progress import format_duration
from hybrid_tools.training.request import Display
from hybrid_tools.training.trainer import StepResult

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

PLAIN_INTERVAL_S = 10.0
SMOOTHING = 0.05  # weight of the newest step in what is shown


class _Means:
    """Loss and speed, smoothed, as a short text."""

    def __init__(self) -> None:
        self._loss: float | None = None
        self._tokens_per_s: float | None = None

    def add(self, result: StepResult, tokens_per_s: float) -> None:
        self._loss = _smoothed(self._loss, result.loss)
        self._tokens_per_s = _smoothed(self._tokens_per_s, tokens_per_s)

    def describe(self, result: StepResult) -> str:
        return f"loss {self._loss:.3f}, zeros {100 * result.zeros:.1f} %, {self._tokens_per_s:.0f} tokens/s"


class PlainDisplay:
    """Whole lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._means = _Means()
        self._first: tuple[float, int] | None = None
        self._printed_s = 0.0

    def say(self, message: str) -> None:
        """Print one line."""
        self._stream.write(message + "\n")
        self._stream.flush()

    def step(self, result: StepResult, num_steps: int, tokens_per_s: float) -> None:
        """Print where the run is, when the last line is old enough."""
        now_s = time.monotonic()
        self._means.add(result, tokens_per_s)
        if self._first is None:
            self._first = (now_s, result.step)
        if now_s - self._printed_s < PLAIN_INTERVAL_S and result.step < num_steps:
            return
        self._printed_s = now_s
        first_s, first_step = self._first
        line = f"step {result.step} of {num_steps}: {self._means.describe(result)}"
        if first_step < result.step < num_steps:
            left_s = (now_s - first_s) / (result.step - first_step) * (num_steps - result.step)
            line += f", {format_duration(left_s)} left"
        self.say(line)

    def close(self) -> None:
        """Nothing to give back."""


class TerminalDisplay:
    """One line that rich moves."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._means = _Means()
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def say(self, message: str) -> None:
        """Print one line, above the moving one."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            self._stream.write(message + "\n")

    def step(self, result: StepResult, num_steps: int, tokens_per_s: float) -> None:
        """Move the line."""
        self._means.add(result, tokens_per_s)
        if self._bar is None or self._task is None:
            self._start(result.step - 1, num_steps)
        assert self._bar is not None
        assert self._task is not None
        self._bar.update(self._task, completed=result.step, description=self._means.describe(result))

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def _start(self, done: int, num_steps: int) -> None:
        from rich.console import Console  # noqa: PLC0415 - imported when something is drawn
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn  # noqa: PLC0415
        from rich.progress import Progress as RichProgress  # noqa: PLC0415

        self._bar = RichProgress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=num_steps, completed=done)


def console_display(stream: TextIO | None = None) -> Display:
    """The display that suits `stream`, which is stderr unless told."""
    stream = sys.stderr if stream is None else stream
    return TerminalDisplay(stream) if stream.isatty() else PlainDisplay(stream)


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTHING * (new - old)
