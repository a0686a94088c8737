"""A token's work in order, on both sides: launches, marks in the GPU's stream, waits for them, programs of the CPU.

Launches between two of the host's own steps are one piece of work. On a GPU each piece is done as it is written the
first times, so that everything is compiled and warm, then recorded once and replayed: a CUDA graph each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hybrid_kernels.team import Operation, Program, Team
from hybrid_runtime.gpu.device import GpuDevice, Pool, Work

WARM_UPS = 2


class Steps:
    """Filled once in the order in which they run. programs: of compiled code. Times are the host's, in
    nanoseconds.
    """

    def __init__(self, device: GpuDevice, team: Team) -> None:
        self._device = device
        self._team = team
        self._steps: list[tuple[str, Work]] = []
        self._operations: list[Operation] = []
        self._launches: _Launches | None = None
        self._all_launches: list[_Launches] = []
        self._mark: torch.cuda.Event | None = None
        self._pool = _Pool()
        self.programs: list[Program] = []
        self._timeline: list[tuple[str, int, int]] = []
        self._spent: dict[str, int] = {}

    def launch(self, work: Work) -> None:
        """Work that only launches."""
        self._end_program()
        if self._launches is None:
            self._launches = _Launches(self._device, self._pool)
            self._all_launches.append(self._launches)
            self._steps.append(("launches", self._launches.run))
        self._launches.works.append(work)

    def mark(self) -> None:
        """What `wait` waits for: everything that is launched before."""
        self._host("mark", self._set_mark)

    def wait(self) -> None:
        """For the last mark."""
        self._host("wait for the GPU", lambda: self._device.wait(self._mark))

    def host(self, work: Work) -> None:
        """Something short, in Python."""
        self._host("host", work)

    def compute(self, operations: list[Operation]) -> None:
        """Compiled operations; those of neighbouring calls are one program."""
        self._launches = None
        self._operations += operations

    def end(self) -> None:
        """After the last step."""
        self._end_program()

    def record_again(self) -> None:
        """What was recorded has addresses of memory that is not used any more."""
        for launches in self._all_launches:
            launches.replay = None
        self._pool.handle = None  # it is gone with them

    def run(self) -> None:
        """All of them."""
        self._timeline = []
        for label, work in self._steps:
            started = time.perf_counter_ns()
            work()
            took = time.perf_counter_ns() - started
            self._timeline.append((label, started, took))
            self._spent[label] = self._spent.get(label, 0) + took

    def labels(self) -> list[str]:
        """Of the steps, in order."""
        return [label for label, _ in self._steps]

    def ticks_by_label(self) -> dict[str, int]:
        """Nanoseconds since the last reset, by what the host was at."""
        return dict(self._spent)

    def timeline(self) -> list[tuple[str, int, int]]:
        """Of the last run: each step's label, when it began, and how long the host was at it."""
        return list(self._timeline)

    def reset_ticks(self) -> None:
        """Begin at zero."""
        self._spent = {}

    def _host(self, label: str, work: Work) -> None:
        self._end_program()
        self._launches = None
        self._steps.append((label, work))

    def _set_mark(self) -> None:
        self._mark = self._device.mark()

    def _end_program(self) -> None:
        if self._operations:
            program = self._team.program(self._operations)
            self.programs.append(program)
            self._steps.append(("CPU", lambda: self._team.run(program)))
            self._operations = []


@dataclass(slots=True)
class _Pool:
    """What a token's pieces are recorded in; made with the first of them."""

    handle: Pool | None = None


class _Launches:
    """Launches without anything of the host's in between."""

    def __init__(self, device: GpuDevice, pool: _Pool) -> None:
        self.works: list[Work] = []
        self._device = device
        self._pool = pool
        self._num_runs = 0
        self.replay: Callable[[], None] | None = None

    def run(self) -> None:
        if self.replay is None and self._device.is_cuda and self._device.replays and self._num_runs >= WARM_UPS:
            if self._pool.handle is None:
                self._pool.handle = self._device.new_pool()
            self.replay = self._device.recorded(self._all, self._pool.handle)
        self._num_runs += 1
        (self.replay or self._all)()

    def _all(self) -> None:
        for work in self.works:
            work()
