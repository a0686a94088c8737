"""The speed at which this machine's threads read memory."""

from __future__ import annotations

import statistics
import time

import numpy as np

from hybrid_kernels.bandwidth import layout
from hybrid_kernels.native.arguments import Word, words
from hybrid_kernels.native.huge_pages import huge_empty
from hybrid_kernels.native.kernel_names import kernel
from hybrid_kernels.team import Operation, Team


def read_bandwidth(team: Team, num_bytes: int = 1 << 30, seconds: float = 0.5) -> float:
    """Bytes a second that the team's threads read together from anonymous memory, the median of passes over num_bytes.

    num_bytes should be far above the caches' size. Takes at least three passes and about that many seconds.
    """
    num_bytes -= num_bytes % layout.BLOCK_BYTES
    if num_bytes <= 0:
        raise ValueError(f"num_bytes is below one block of {layout.BLOCK_BYTES}")
    memory = huge_empty(num_bytes)
    memory[:] = 1
    sums = np.zeros(8 * team.num_threads, dtype=np.int64)
    values: dict[int, Word] = {layout.MEMORY: memory, layout.NUM_BYTES: num_bytes, layout.SUMS: sums}
    program = team.program([Operation(kernel("read_memory"), "bandwidth", words(layout.NUM_WORDS, values))])
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        started_s = time.perf_counter()
        team.run(program)
        times.append(time.perf_counter() - started_s)
    return num_bytes / statistics.median(times)
