"""Reading memory as fast as it goes, for what other speeds are measured against."""

from __future__ import annotations

from hybrid_kernels.bandwidth.layout import BLOCK_BYTES, MEMORY, NUM_BYTES, SUMS
from hybrid_kernels.native.memory_access import atomic_add, get_i64, put_i64


def read_memory(arguments: int, worker: int, counter: int) -> None:
    """Read every byte once; each worker keeps an exclusive-or of what it saw."""
    memory, num_bytes = get_i64(arguments, MEMORY), get_i64(arguments, NUM_BYTES)
    folded = 0
    while True:
        start = atomic_add(counter, 1) * BLOCK_BYTES
        if start >= num_bytes:
            break
        block = memory + start
        for word in range(BLOCK_BYTES // 8):
            folded ^= get_i64(block, word)
    put_i64(get_i64(arguments, SUMS), worker * 8, folded)
