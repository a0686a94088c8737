"""The loop that every worker runs: operations one after another, a barrier after those that others read from."""

from __future__ import annotations

import numba

from hybrid_kernels.native.liveness import call_off_if_gone, say_who
from hybrid_kernels.native.memory_access import (
    atomic_add,
    atomic_get,
    atomic_put,
    call_kernel,
    get_i64,
    prefetch,
    put_i64,
    relax,
    sleep_while,
    ticks,
    wake_all,
)
from hybrid_kernels.native.state_layout import (
    AHEAD,
    AHEAD_BYTES,
    AHEAD_STRIDE,
    ARGUMENTS,
    ARRIVED,
    BARRIER,
    CALLED_OFF,
    CLOSED,
    COUNTERS,
    EPOCH,
    FUNCTION,
    GENERATION,
    LENGTH,
    LINE,
    NUM_WORKERS,
    OPERATION_WORDS,
    PROGRAM,
    SLEEPERS,
    STARTED,
    TICKS,
)

SPINS = 2000  # some 40 us of pauses: longer than a balanced share's end, far shorter than a scheduler's slice


@numba.njit(error_model="numpy")
def _wait_while(address: int, value: int, sleepers: int) -> None:
    """Return when the word at address is not value any more. sleepers: word that counts who must be woken."""
    for _ in range(SPINS):
        if atomic_get(address) != value:
            return
        relax()
    atomic_add(sleepers, 1)
    while atomic_get(address) == value:
        sleep_while(address, value)
    atomic_add(sleepers, -1)


@numba.njit(error_model="numpy")
def _wait_for_workers(state: int, generation: int) -> None:
    """Return when the barrier of that generation is passed, or a worker is gone that would have had to come."""
    address, sleepers = state + 8 * GENERATION, state + 8 * SLEEPERS
    for _ in range(SPINS):
        if atomic_get(address) != generation:
            return
        relax()
    atomic_add(sleepers, 1)
    while atomic_get(address) == generation:
        sleep_while(address, generation)  # a tenth of a second at most
        if atomic_get(address) == generation and call_off_if_gone(state):
            break
    atomic_add(sleepers, -1)


@numba.njit(error_model="numpy")
def _meet(state: int) -> None:
    """Return when every worker has come here, or the program is called off."""
    if atomic_get(state + 8 * CALLED_OFF) != 0:
        return
    generation = atomic_get(state + 8 * GENERATION)
    if atomic_add(state + 8 * ARRIVED, 1) + 1 == get_i64(state, NUM_WORKERS):
        atomic_put(state + 8 * ARRIVED, 0)
        atomic_put(state + 8 * GENERATION, generation + 1)
        if atomic_get(state + 8 * SLEEPERS) > 0:
            wake_all(state + 8 * GENERATION)
    else:
        _wait_for_workers(state, generation)


@numba.njit(error_model="numpy")
def _prefetch_bytes(address: int, num_bytes: int) -> None:
    for line in range(0, num_bytes, LINE * 8):
        prefetch(address + line)


@numba.njit(error_model="numpy")
def _operations(state: int, worker: int) -> None:
    program, counters = get_i64(state, PROGRAM), get_i64(state, COUNTERS)
    for idx in range(get_i64(state, LENGTH)):
        operation = program + idx * OPERATION_WORDS * 8
        started = ticks()
        call_kernel(get_i64(operation, FUNCTION), get_i64(operation, ARGUMENTS), worker, counters + idx * LINE * 8)
        if get_i64(operation, BARRIER) != 0:
            ahead = get_i64(operation, AHEAD) + worker * get_i64(operation, AHEAD_STRIDE)
            _prefetch_bytes(ahead, get_i64(operation, AHEAD_BYTES))
            _meet(state)
            if atomic_get(state + 8 * CALLED_OFF) != 0:
                return
        if worker == 0:
            put_i64(operation, STARTED, started)
            put_i64(operation, TICKS, get_i64(operation, TICKS) + ticks() - started)


def run_program(state: int, worker: int, counter: int) -> None:
    """Worker 0, the caller's thread: wake the others, take part, return when all have finished."""
    for idx in range(get_i64(state, LENGTH)):
        put_i64(get_i64(state, COUNTERS), idx * LINE, 0)
    others = get_i64(state, NUM_WORKERS) - 1
    say_who(state, 0)
    if others > 0:
        atomic_add(state + 8 * EPOCH, 1)
        wake_all(state + 8 * EPOCH)
    _operations(state, 0)
    if others > 0:
        _meet(state)


def work_until_closed(state: int, worker: int, counter: int) -> None:
    """Every other worker: one program an epoch. counter: an address of words of this worker alone, [0] its epoch."""
    epoch = get_i64(counter, 0)
    say_who(state, worker)
    while True:
        _wait_while(state + 8 * EPOCH, epoch, counter + 8)
        epoch = atomic_get(state + 8 * EPOCH)
        is_last = atomic_get(state + 8 * CLOSED) != 0  # before the barrier: after it the caller may begin to close
        _operations(state, worker)
        _meet(state)
        if is_last or atomic_get(state + 8 * CALLED_OFF) != 0:
            return
