"""The speed of memory: a number that a machine can have, every byte read once, and sizes that tell nothing refused."""

import numpy as np
import pytest

from hybrid_kernels.bandwidth import layout
from hybrid_kernels.bandwidth.op import read_bandwidth
from hybrid_kernels.native.arguments import words
from hybrid_kernels.native.kernel_names import kernel
from hybrid_kernels.team import Operation


def test_the_speed_is_one_that_machines_have(team):
    assert 1e8 < read_bandwidth(team, num_bytes=64 << 20, seconds=0.05) < 1e13


@pytest.mark.parametrize("num_bytes", [0, 1, layout.BLOCK_BYTES - 1, -1])
def test_sizes_below_a_block_are_refused(num_bytes, team):
    with pytest.raises(ValueError, match=f"num_bytes is below one block of {layout.BLOCK_BYTES}"):
        read_bandwidth(team, num_bytes=num_bytes)


def test_every_word_is_read_once(team):
    memory = np.random.default_rng(0).integers(1 << 62, size=5 * layout.BLOCK_BYTES // 8)
    sums = np.zeros(8 * team.num_threads, dtype=np.int64)
    arguments = words(3, {layout.MEMORY: memory, layout.NUM_BYTES: memory.nbytes, layout.SUMS: sums})
    team.run(team.program([Operation(kernel("read_memory"), "read", arguments)]))
    assert np.bitwise_xor.reduce(sums) == np.bitwise_xor.reduce(memory)
