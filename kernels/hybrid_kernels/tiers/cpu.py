"""Splitting a token's active neurons by where they are, compiled; what is on disk only is asked for on the way.

One worker does it: what the cache gives away must follow from the order of neurons and from nothing else, so that the
same text reads the same bundles. reference.py has the policy in plain Python.
"""

from __future__ import annotations

import numba

from hybrid_kernels.native.memory_access import atomic_put, get_i32, get_i64, prefetch, put_i32, put_i64
from hybrid_kernels.tiers.disk_reads import add_miss, submit
from hybrid_kernels.tiers.layout import (
    ARRIVED,
    ASKED,
    COLD_NEURONS,
    DISK,
    EPOCH,
    FIRST_OPEN,
    GPU,
    HAND,
    HITS,
    HOT_NEURONS,
    LAST_USED,
    MOST_ASKED,
    NUM_MISSES,
    NUM_READS,
    NUM_SLOTS,
    NUM_SUBMITTED,
    OWNERS,
    SLOT_BYTES,
    SLOTS,
    SPLIT_BLOCK,
    SPLIT_BUNDLE_BYTES,
    SPLIT_CHOSEN,
    SPLIT_COLD,
    SPLIT_COLD_COUNTS,
    SPLIT_COUNTS,
    SPLIT_DISK,
    SPLIT_FILE,
    SPLIT_HOMES,
    SPLIT_HOT,
    SPLIT_HOT_COUNTS,
    SPLIT_NEEDED,
    SPLIT_NUM_NEURONS,
    SPLIT_NUM_SHARES,
    SPLIT_NUM_SLOTS,
    SPLIT_OFFSETS,
    SPLIT_READS,
    SPLIT_SELECTED,
    TIER_BITS,
    TOTAL_MISSES,
)

SUBMIT_EVERY = 32  # misses: the disk begins while the rest is looked for
HOMES_AHEAD = 16  # neurons


def split_neurons(arguments: int, worker: int, counter: int) -> None:
    """Worker 0 alone; see the module."""
    if worker != 0:
        return
    disk = get_i64(arguments, SPLIT_DISK)
    put_i64(disk, EPOCH, get_i64(disk, EPOCH) + 1)
    put_i64(disk, NUM_MISSES, 0)
    put_i64(disk, NUM_READS, 0)
    put_i64(disk, NUM_SUBMITTED, 0)
    put_i64(disk, FIRST_OPEN, 0)
    atomic_put(disk + 8 * ARRIVED, 0)
    num_hot, num_cold = 0, 0
    for slot in range(get_i64(arguments, SPLIT_NUM_SLOTS)):
        _split_network(arguments, disk, slot)
        num_hot += get_i64(get_i64(arguments, SPLIT_HOT_COUNTS), slot)
        num_cold += get_i64(get_i64(arguments, SPLIT_COLD_COUNTS), slot)
    submit(disk)
    put_i64(disk, TOTAL_MISSES, get_i64(disk, TOTAL_MISSES) + get_i64(disk, NUM_MISSES))
    put_i64(disk, HOT_NEURONS, get_i64(disk, HOT_NEURONS) + num_hot)
    put_i64(disk, COLD_NEURONS, get_i64(disk, COLD_NEURONS) + num_cold)


@numba.njit(error_model="numpy")
def _split_network(arguments: int, disk: int, slot: int) -> None:
    chosen, num_neurons = get_i64(arguments, SPLIT_CHOSEN), get_i64(arguments, SPLIT_NUM_NEURONS)
    network = 0 if chosen == 0 else get_i64(chosen, slot)
    put_i64(get_i64(arguments, SPLIT_HOT_COUNTS), slot, 0)
    put_i64(get_i64(arguments, SPLIT_COLD_COUNTS), slot, 0)
    selected, block_size = get_i64(arguments, SPLIT_SELECTED), get_i64(arguments, SPLIT_BLOCK)
    if selected == 0:
        for neuron in range(num_neurons):
            _place(arguments, disk, network, slot, neuron)
    else:
        selected += slot * num_neurons * 4
        num_blocks = (num_neurons + block_size - 1) // block_size
        counts = get_i64(arguments, SPLIT_COUNTS) + slot * num_blocks * 8
        homes = get_i64(get_i64(arguments, SPLIT_HOMES), network)
        for block in range(num_blocks):
            for place in range(get_i64(counts, block)):
                at = block * block_size + place
                prefetch(homes + 8 * get_i32(selected, min(at + HOMES_AHEAD, num_neurons - 1)))  # maybe none of ours
                _place(arguments, disk, network, slot, get_i32(selected, at))
    _count_needed(arguments, slot)


@numba.njit(error_model="numpy")
def _place(arguments: int, disk: int, network: int, slot: int, neuron: int) -> None:
    """Put an active neuron on the list that computes it."""
    num_neurons = get_i64(arguments, SPLIT_NUM_NEURONS)
    home = get_i64(get_i64(arguments, SPLIT_HOMES), network) + 8 * neuron
    tier = get_i64(home, 0) & TIER_BITS
    if tier == GPU:
        counts = get_i64(arguments, SPLIT_HOT_COUNTS)
        count = get_i64(counts, slot)
        put_i32(get_i64(arguments, SPLIT_HOT), slot * num_neurons + count, neuron)
        put_i64(counts, slot, count + 1)
        return
    if tier == DISK:
        _ask(arguments, disk, network, neuron, home)
    counts = get_i64(arguments, SPLIT_COLD_COUNTS)
    count = get_i64(counts, slot)
    put_i32(get_i64(arguments, SPLIT_COLD), slot * num_neurons + count, neuron)
    put_i32(get_i64(arguments, SPLIT_READS), slot * num_neurons + count, get_i64(disk, NUM_MISSES))
    put_i64(counts, slot, count + 1)


@numba.njit(error_model="numpy")
def _ask(arguments: int, disk: int, network: int, neuron: int, home: int) -> None:
    """Find the bundle in the cache, or ask the disk for it. home: address of the neuron's."""
    asked, last_used, epoch = get_i64(disk, ASKED), get_i64(disk, LAST_USED), get_i64(disk, EPOCH)
    address = get_i64(home, 0) & ~TIER_BITS
    if address != 0:
        place = (address - get_i64(disk, SLOTS)) // get_i64(disk, SLOT_BYTES)
        put_i64(asked, place, min(MOST_ASKED, get_i64(asked, place) + 1))
        put_i64(last_used, place, epoch)
        put_i64(disk, HITS, get_i64(disk, HITS) + 1)
        return
    place, owners = _free_place(disk), get_i64(disk, OWNERS)
    owner = get_i64(owners, place)
    if owner != 0:
        put_i64(owner, 0, DISK)
    slot = get_i64(disk, SLOTS) + place * get_i64(disk, SLOT_BYTES)
    put_i64(owners, place, home)
    put_i64(asked, place, 1)
    put_i64(last_used, place, epoch)
    put_i64(home, 0, slot | DISK)
    offset = get_i64(get_i64(arguments, SPLIT_OFFSETS), network) + neuron * get_i64(arguments, SPLIT_BUNDLE_BYTES)
    add_miss(disk, get_i64(arguments, SPLIT_FILE), offset, slot)
    if get_i64(disk, NUM_MISSES) % SUBMIT_EVERY == 0:
        submit(disk)


@numba.njit(error_model="numpy")
def _free_place(disk: int) -> int:
    """The next slot that nobody has asked for since the hand came by."""
    num_slots, epoch, owners = get_i64(disk, NUM_SLOTS), get_i64(disk, EPOCH), get_i64(disk, OWNERS)
    asked, last_used, hand = get_i64(disk, ASKED), get_i64(disk, LAST_USED), get_i64(disk, HAND)
    while True:
        place = hand
        hand = 0 if hand + 1 == num_slots else hand + 1
        if get_i64(last_used, place) == epoch:
            continue
        count = get_i64(asked, place)
        if get_i64(owners, place) == 0 or count == 0:
            put_i64(disk, HAND, hand)
            return place
        put_i64(asked, place, count - 1)


@numba.njit(error_model="numpy")
def _count_needed(arguments: int, slot: int) -> None:
    """By share of the cold neurons: misses up to its last neuron."""
    num_shares, num_neurons = get_i64(arguments, SPLIT_NUM_SHARES), get_i64(arguments, SPLIT_NUM_NEURONS)
    count = get_i64(get_i64(arguments, SPLIT_COLD_COUNTS), slot)
    reads = get_i64(arguments, SPLIT_READS) + slot * num_neurons * 4
    for share in range(num_shares):
        last = count * (share + 1) // num_shares
        is_empty = last == count * share // num_shares
        needed = 0 if is_empty else get_i32(reads, last - 1)
        put_i64(get_i64(arguments, SPLIT_NEEDED), slot * num_shares + share, needed)
