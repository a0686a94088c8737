"""Bundles read from disk while others are computed, compiled: reads are handed in together and looked after in between.

Linux's asynchronous reads past the page cache (io_submit) need no thread that waits and one system call for many reads:
measured, a seventh of a core for 50 000 reads a second. Who runs a share of neurons looks for arrived reads before it,
so that the disk always has work; who needs a bundle that has not arrived waits for it. Where the system has no such
reads, whoever comes to wait reads one after another.
"""

from __future__ import annotations

import numba

from hybrid_kernels.native.liveness import call_off_if_gone
from hybrid_kernels.native.memory_access import (
    atomic_add,
    atomic_get,
    atomic_put,
    copy_bytes,
    get_i64,
    put_i64,
    read_at,
    sleep_while,
    system_call,
    ticks,
    wake_all,
)
from hybrid_kernels.tiers.layout import (
    ARRIVED,
    BLOCKS,
    BUFFER_BYTES,
    BUFFERS,
    CONTEXT,
    EVENTS,
    FAILED,
    FAILED_FILE,
    FIRST_OPEN,
    FREE,
    LOCK,
    MISS_OFFSET,
    MISS_SLOT,
    MISSES,
    NUM_BUFFERS,
    NUM_FREE,
    NUM_MISSES,
    NUM_READS,
    NUM_SUBMITTED,
    POINTERS,
    READ_BYTES,
    READ_COUNT,
    READ_DONE,
    READ_FILE,
    READ_FIRST,
    READ_OFFSET,
    READ_WORDS,
    READS,
    SLEEPERS,
    SLOT_BYTES,
    STALL_TICKS,
    TEAM,
    TIMEOUT,
    TOTAL_BYTES,
    TOTAL_READS,
)

IO_GETEVENTS, IO_SUBMIT = 208, 209  # of x86-64; disk_memory.py asks for no context elsewhere
BLOCK_BYTES, EVENT_BYTES = 64, 32
SPINS = 200  # some microseconds; without the processor's own pause, which differs from one to the next
ENDED_EARLY = 1
UNREADABLE = -5  # EIO
WORKER_GONE = -125  # ECANCELED: who held the lock will not give it back
EVERYTHING = 1 << 62


@numba.njit(error_model="numpy")
def wait_for_misses(disk: int, needed: int) -> None:
    """Return when the first `needed` misses of the layer have arrived, or a read has failed."""
    if atomic_get(disk + 8 * ARRIVED) >= get_i64(disk, NUM_MISSES):
        return
    if _lock(disk):
        look(disk, False)
        atomic_add(disk + 8 * LOCK, -1)
    arrived = atomic_get(disk + 8 * ARRIVED)
    if arrived >= needed:
        return
    started = ticks()
    while arrived < needed and get_i64(disk, FAILED) == 0:
        if _lock(disk):
            look(disk, True)
            atomic_add(disk + 8 * LOCK, -1)
        else:
            _wait_for_others(disk, arrived)
        arrived = atomic_get(disk + 8 * ARRIVED)
    atomic_add(disk + 8 * STALL_TICKS, ticks() - started)


@numba.njit(error_model="numpy")
def _lock(disk: int) -> bool:
    if atomic_add(disk + 8 * LOCK, 1) == 0:
        return True
    atomic_add(disk + 8 * LOCK, -1)
    return False


@numba.njit(error_model="numpy")
def _wait_for_others(disk: int, arrived: int) -> None:
    """Until more has arrived, or for a while."""
    for _ in range(SPINS):
        if atomic_get(disk + 8 * ARRIVED) != arrived or atomic_get(disk + 8 * LOCK) == 0:
            return
    atomic_add(disk + 8 * SLEEPERS, 1)
    if atomic_get(disk + 8 * LOCK) != 0:
        sleep_while(disk + 8 * ARRIVED, arrived)
        if atomic_get(disk + 8 * ARRIVED) == arrived and call_off_if_gone(get_i64(disk, TEAM)):
            fail(disk, WORKER_GONE)
    atomic_add(disk + 8 * SLEEPERS, -1)


@numba.njit(error_model="numpy")
def add_miss(disk: int, file: int, offset: int, slot: int) -> None:
    """Ask for a bundle at an offset of a file, to be put into a slot."""
    miss, num_bytes = get_i64(disk, NUM_MISSES), get_i64(disk, SLOT_BYTES)
    place = get_i64(disk, MISSES) + miss * 16
    put_i64(place, MISS_OFFSET, offset)
    put_i64(place, MISS_SLOT, slot)
    put_i64(disk, NUM_MISSES, miss + 1)
    num_reads, page = get_i64(disk, NUM_READS), -4096
    last = get_i64(disk, READS) + (num_reads - 1) * READ_WORDS * 8
    end = (offset + num_bytes + 4095) & page
    if miss > 0 and num_reads > get_i64(disk, NUM_SUBMITTED) and get_i64(last, READ_FILE) == file:
        before = get_i64(place - 16, MISS_OFFSET) + num_bytes
        if before == offset and end - get_i64(last, READ_OFFSET) <= get_i64(disk, BUFFER_BYTES):
            put_i64(last, READ_BYTES, end - get_i64(last, READ_OFFSET))
            put_i64(last, READ_COUNT, get_i64(last, READ_COUNT) + 1)
            return
    read = last + READ_WORDS * 8
    put_i64(read, READ_FILE, file)
    put_i64(read, READ_OFFSET, offset & page)
    put_i64(read, READ_BYTES, end - (offset & page))
    put_i64(read, READ_FIRST, miss)
    put_i64(read, READ_COUNT, 1)
    put_i64(read, READ_DONE, 0)
    put_i64(disk, NUM_READS, num_reads + 1)


@numba.njit(error_model="numpy")
def submit(disk: int) -> None:
    """Hand in as many reads as there are free buffers; only who holds the lock may."""
    context = get_i64(disk, CONTEXT)
    if context == 0 or get_i64(disk, FAILED) != 0:
        return
    first, num_buffers = get_i64(disk, NUM_SUBMITTED), get_i64(disk, NUM_BUFFERS)
    count = min(get_i64(disk, NUM_FREE), get_i64(disk, NUM_READS) - first)
    if count <= 0:
        return
    for idx in range(count):
        buffer = get_i64(get_i64(disk, FREE), get_i64(disk, NUM_FREE) - 1 - idx)
        read = get_i64(disk, READS) + (first + idx) * READ_WORDS * 8
        block = get_i64(disk, BLOCKS) + buffer * BLOCK_BYTES
        put_i64(block, 0, (first + idx) * num_buffers + buffer)  # aio_data
        put_i64(block, 1, 0)
        put_i64(block, 2, get_i64(read, READ_FILE) << 32)  # a read (0), and the file
        put_i64(block, 3, get_i64(disk, BUFFERS) + buffer * get_i64(disk, BUFFER_BYTES))
        put_i64(block, 4, get_i64(read, READ_BYTES))
        put_i64(block, 5, get_i64(read, READ_OFFSET))
        put_i64(block, 6, 0)
        put_i64(block, 7, 0)
        put_i64(get_i64(disk, POINTERS), idx, block)
    done = system_call(IO_SUBMIT, context, count, get_i64(disk, POINTERS), 0, 0)
    if done < 0:
        if get_i64(disk, NUM_FREE) == num_buffers:  # nothing is under way that could make room
            fail(disk, done)
        return
    put_i64(disk, NUM_FREE, get_i64(disk, NUM_FREE) - done)
    put_i64(disk, NUM_SUBMITTED, first + done)


@numba.njit(error_model="numpy")
def fail(disk: int, error: int) -> None:
    """Let everyone pass who waits; what they compute is not used."""
    put_i64(disk, FAILED, error)
    atomic_put(disk + 8 * ARRIVED, EVERYTHING)
    if atomic_get(disk + 8 * SLEEPERS) > 0:
        wake_all(disk + 8 * ARRIVED)


@numba.njit(error_model="numpy")
def look(disk: int, waits: bool) -> None:
    """Take in what has arrived, after a wait for the first where asked for; only who holds the lock may."""
    if get_i64(disk, FAILED) != 0:
        return
    if get_i64(disk, CONTEXT) == 0:
        if waits:
            _read_one(disk)
        return
    submit(disk)
    num_buffers = get_i64(disk, NUM_BUFFERS)
    if get_i64(disk, NUM_FREE) == num_buffers:
        return
    events = get_i64(disk, EVENTS)
    count = system_call(
        IO_GETEVENTS, get_i64(disk, CONTEXT), 1 if waits else 0, num_buffers, events, get_i64(disk, TIMEOUT)
    )
    if count < 0 and count != -4:  # EINTR: a signal came, look again
        fail(disk, count)
    for idx in range(count):
        event = events + idx * EVENT_BYTES
        data = get_i64(event, 0)
        read = data // num_buffers
        buffer = data - read * num_buffers
        put_i64(get_i64(disk, FREE), get_i64(disk, NUM_FREE), buffer)
        put_i64(disk, NUM_FREE, get_i64(disk, NUM_FREE) + 1)
        _take_in(disk, read, buffer, get_i64(event, 2))
    if count > 0:
        submit(disk)
        _advance(disk)


@numba.njit(error_model="numpy")
def _read_one(disk: int) -> None:
    """The next read, by this thread."""
    idx = get_i64(disk, NUM_SUBMITTED)
    if idx >= get_i64(disk, NUM_READS):
        return
    read = get_i64(disk, READS) + idx * READ_WORDS * 8
    put_i64(disk, NUM_SUBMITTED, idx + 1)
    result = read_at(
        get_i64(read, READ_FILE), get_i64(disk, BUFFERS), get_i64(read, READ_BYTES), get_i64(read, READ_OFFSET)
    )
    _take_in(disk, idx, 0, UNREADABLE if result < 0 else result)
    _advance(disk)


@numba.njit(error_model="numpy")
def _take_in(disk: int, idx: int, buffer: int, result: int) -> None:
    """Copy a read's bundles into their slots. result: bytes read, or a negative errno."""
    read = get_i64(disk, READS) + idx * READ_WORDS * 8
    first, count = get_i64(read, READ_FIRST), get_i64(read, READ_COUNT)
    offset, num_bytes = get_i64(read, READ_OFFSET), get_i64(disk, SLOT_BYTES)
    source = get_i64(disk, BUFFERS) + buffer * get_i64(disk, BUFFER_BYTES)
    last = get_i64(disk, MISSES) + (first + count - 1) * 16
    if result < get_i64(last, MISS_OFFSET) + num_bytes - offset:
        put_i64(disk, FAILED_FILE, get_i64(read, READ_FILE))
        fail(disk, ENDED_EARLY if result >= 0 else result)
        return
    for miss in range(first, first + count):
        place = get_i64(disk, MISSES) + miss * 16
        copy_bytes(get_i64(place, MISS_SLOT), source + get_i64(place, MISS_OFFSET) - offset, num_bytes)
    put_i64(read, READ_DONE, 1)
    put_i64(disk, TOTAL_READS, get_i64(disk, TOTAL_READS) + 1)
    put_i64(disk, TOTAL_BYTES, get_i64(disk, TOTAL_BYTES) + get_i64(read, READ_BYTES))


@numba.njit(error_model="numpy")
def _advance(disk: int) -> None:
    """Tell how many misses have arrived without a gap."""
    if get_i64(disk, FAILED) != 0:
        return
    reads, first, num_reads = get_i64(disk, READS), get_i64(disk, FIRST_OPEN), get_i64(disk, NUM_READS)
    while first < num_reads and get_i64(reads + first * READ_WORDS * 8, READ_DONE) != 0:
        first += 1
    put_i64(disk, FIRST_OPEN, first)
    arrived = get_i64(disk, NUM_MISSES)
    if first < num_reads:
        arrived = get_i64(reads + first * READ_WORDS * 8, READ_FIRST)
    atomic_put(disk + 8 * ARRIVED, arrived)
    if atomic_get(disk + 8 * SLEEPERS) > 0:
        wake_all(disk + 8 * ARRIVED)
