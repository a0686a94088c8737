"""What decoding has done: seconds in compiled code, and how many rows of neurons were read."""

from __future__ import annotations

import weakref

from hybrid_kernels.team import Team
from hybrid_runtime.model.stepping import Stepping


class DecodeCounters:
    """Sums over tokens, layers and experts since the last reset, of tokens that were decoded one at a time.

    gate_rows, up_rows, down_rows: rows of each kind that were read, by programs that still exist. kernel_s counts
    batches too.
    """

    def __init__(self, team: Team) -> None:
        self._team = team
        self._programs: weakref.WeakSet[Stepping] = weakref.WeakSet()
        self._active_are_read = False
        self._kernel_s_before = 0.0

    def watch(self, program: Stepping, *, active_are_read: bool) -> None:
        """Count what a program reads. active_are_read: whether the gates that are read are those of active neurons."""
        self._programs.add(program)
        self._active_are_read = active_are_read

    def reset(self) -> None:
        """Begin at zero."""
        self._kernel_s_before = self._team.kernel_s
        for program in self._programs:
            program.read_rows[:] = 0

    @property
    def kernel_s(self) -> float:
        """Seconds inside compiled code."""
        return self._team.kernel_s - self._kernel_s_before

    @property
    def gate_rows(self) -> int:
        """Gate rows read; 0 for networks without a gate."""
        return self._count(0)

    @property
    def up_rows(self) -> int:
        """Up rows read: where the gate fires, or there is none."""
        return self._count(1)

    @property
    def down_rows(self) -> int:
        """Down rows read: of neurons that are not zero."""
        return self._count(2)

    @property
    def carried_values(self) -> int:
        """Values of cold neurons that went to the GPU for its down rows."""
        return self._count(3)

    @property
    def active_neurons(self) -> int:
        """Neurons that the predictor selected, or whose gate fired where there is no predictor."""
        return max(self.gate_rows, self.up_rows) if self._active_are_read else self.up_rows

    def _count(self, kind: int) -> int:
        return sum(int(program.read_rows[:, kind].sum()) for program in self._programs)
