"""Whether the other workers of a team are still there, compiled: who waits long asks the system before waiting on.

A thread that is gone (killed by the system, or ended by a library) would leave the others waiting for ever. Being slow
is no fault: a worker whose memory is being swapped in may take seconds. Linux on x86-64 and ARM can be asked; elsewhere
nobody is ever found to be gone.
"""

from __future__ import annotations

import platform
import sys

import numba

from hybrid_kernels.native.memory_access import (
    atomic_add,
    atomic_get,
    atomic_put,
    get_i64,
    put_i64,
    system_call,
    wake_all,
)
from hybrid_kernels.native.state_layout import CALLED_OFF, GENERATION, NUM_WORKERS, SLEEPERS, THREADS

_MACHINE = platform.machine() if sys.platform == "linux" else ""
# Linux's numbers of gettid, getpid and tgkill
_GET_THREAD, _GET_PROCESS, _SIGNAL_THREAD = {"x86_64": (186, 39, 234), "aarch64": (178, 172, 131)}.get(
    _MACHINE, (0, 0, 0)
)
_GONE = -3  # ESRCH


@numba.njit(error_model="numpy")
def say_who(state: int, worker: int) -> None:
    """Leave this thread's number where the others find it."""
    if _GET_THREAD != 0:
        put_i64(get_i64(state, THREADS), worker, system_call(_GET_THREAD, 0, 0, 0, 0, 0))


@numba.njit(error_model="numpy")
def call_off_if_gone(state: int) -> bool:
    """Whether the program is called off; it is from now on where a worker that has begun it is gone."""
    if atomic_get(state + 8 * CALLED_OFF) != 0:
        return True
    if _GET_THREAD == 0:
        return False
    process = system_call(_GET_PROCESS, 0, 0, 0, 0, 0)
    for worker in range(get_i64(state, NUM_WORKERS)):
        thread = get_i64(get_i64(state, THREADS), worker)
        if thread > 0 and system_call(_SIGNAL_THREAD, process, thread, 0, 0, 0) == _GONE:
            atomic_put(state + 8 * CALLED_OFF, 1)
            atomic_add(state + 8 * GENERATION, 1)  # who sleeps there looks again
            if atomic_get(state + 8 * SLEEPERS) > 0:
                wake_all(state + 8 * GENERATION)
            return True
    return False
