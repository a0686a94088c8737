"""A program may ask for threads twice: Numba's pool has the size of the first call, and kernels still compile."""

import os
import subprocess
import sys

PROGRAM = """
from hybrid_runtime.cli.loading import use_threads

use_threads(2)
import numba, numpy as np

@numba.njit(parallel=True)
def total(values):
    result = 0.0
    for idx in numba.prange(values.size):
        result += values[idx]
    return result

assert total(np.ones(8)) == 8.0
use_threads(1)
assert total(np.ones(8, np.float32)) == 8.0  # other types: compiled now
assert (numba.config.NUMBA_NUM_THREADS, numba.get_num_threads()) == (2, 1)
"""


def test_kernels_compile_after_the_number_of_threads_changed():
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
