"""Splitting neurons by tier and the cache's policy: the compiled kernel against plain Python."""

from __future__ import annotations

import ctypes
import os
import random
from itertools import pairwise

import numpy as np
import pytest

from hybrid_kernels.native.arguments import words
from hybrid_kernels.native.kernel_names import kernel
from hybrid_kernels.team import Operation
from hybrid_kernels.tiers import layout
from hybrid_kernels.tiers.layout import DISK, GPU, MOST_ASKED, RAM
from hybrid_kernels.tiers.reference import NeuronCache, split_neurons

NUM_NEURONS, NUM_NETWORKS, NUM_SHARES, BLOCK = 150, 3, 4, 64
BUNDLE_BYTES = 704  # no divisor of a page
TIERS = [GPU, RAM, DISK, DISK]


class Split:
    """One layer's split over random bundles in a file, as a program."""

    def __init__(self, folder, team, seed, *, num_networks_chosen=2, spare_slots=20, asynchronous=False):
        from hybrid_runtime.tiers.disk_cache import DiskCache  # noqa: PLC0415  # its memory is the runtime's

        generator = np.random.default_rng(seed)
        self.team = team
        self.tiers = generator.choice(TIERS, size=(NUM_NETWORKS, NUM_NEURONS))
        self.data = generator.integers(0, 256, (NUM_NETWORKS, NUM_NEURONS, BUNDLE_BYTES), dtype=np.uint8)
        self.path = folder / "bundles.bin"
        self.path.write_bytes(b"\0" * layout.PAGE + self.data.tobytes())
        self.file = os.open(self.path, os.O_RDONLY)
        slots = num_networks_chosen
        most = slots * NUM_NEURONS
        self.num_slots = most + spare_slots
        self.cache = DiskCache(self.num_slots, BUNDLE_BYTES, most, asynchronous=asynchronous)
        self.cache.serve(team)
        self.homes = self.tiers.astype(np.int64)
        self.chosen = np.zeros(slots, dtype=np.int64)
        self.selected = np.zeros((slots, NUM_NEURONS), dtype=np.int32)
        self.counts = np.zeros((slots, -(-NUM_NEURONS // BLOCK)), dtype=np.int64)
        self.hot, self.cold, self.reads = (np.zeros((slots, NUM_NEURONS), dtype=np.int32) for _ in range(3))
        self.hot_counts, self.cold_counts = (np.zeros(slots, dtype=np.int64) for _ in range(2))
        self.needed = np.zeros((slots, NUM_SHARES), dtype=np.int64)
        rows = np.array([row.ctypes.data for row in self.homes], dtype=np.int64)
        offsets = np.array(
            [layout.PAGE + idx * NUM_NEURONS * BUNDLE_BYTES for idx in range(NUM_NETWORKS)], dtype=np.int64
        )
        self.kept = (rows, offsets)
        values = {
            layout.SPLIT_NUM_SLOTS: slots,
            layout.SPLIT_CHOSEN: self.chosen,
            layout.SPLIT_NUM_NEURONS: NUM_NEURONS,
            layout.SPLIT_SELECTED: self.selected,
            layout.SPLIT_COUNTS: self.counts,
            layout.SPLIT_BLOCK: BLOCK,
            layout.SPLIT_HOMES: rows,
            layout.SPLIT_OFFSETS: offsets,
            layout.SPLIT_FILE: self.file,
            layout.SPLIT_BUNDLE_BYTES: BUNDLE_BYTES,
            layout.SPLIT_HOT: self.hot,
            layout.SPLIT_HOT_COUNTS: self.hot_counts,
            layout.SPLIT_COLD: self.cold,
            layout.SPLIT_COLD_COUNTS: self.cold_counts,
            layout.SPLIT_READS: self.reads,
            layout.SPLIT_NUM_SHARES: NUM_SHARES,
            layout.SPLIT_NEEDED: self.needed,
            layout.SPLIT_DISK: self.cache.words,
        }
        self.program = team.program([Operation(kernel("split_neurons"), "split", words(layout.SPLIT_WORDS, values))])

    def run(self, chosen, active):
        """chosen: networks; active: ascending neurons of each."""
        self.chosen[:] = chosen
        self.counts[:] = 0
        for slot, neurons in enumerate(active):
            for neuron in neurons:
                block = neuron // BLOCK
                self.selected[slot, block * BLOCK + self.counts[slot, block]] = neuron
                self.counts[slot, block] += 1
        self.team.run(self.program)

    def word(self, name):
        return int(self.cache.words[name])


@pytest.fixture
def split(tmp_path, lone_team):
    made = Split(tmp_path, lone_team, seed=3)
    yield made
    os.close(made.file)


def random_token(chance):
    """Two networks and their active neurons: mostly the first ones, so that some are asked for again and again."""
    chosen = chance.sample(range(NUM_NETWORKS), 2)
    return chosen, [
        sorted({min(int(chance.expovariate(1 / 40)), NUM_NEURONS - 1) for _ in range(chance.randrange(80))})
        for _ in chosen
    ]


def test_split_and_cache_are_those_of_the_reference(split):
    chance, reference = random.Random(5), NeuronCache(split.num_slots)
    hits = misses = hot = cold = 0
    for _ in range(300):
        chosen, active = random_token(chance)
        split.run(chosen, active)
        reference.begin_layer()
        missed = 0
        for slot, (network, neurons) in enumerate(zip(chosen, active, strict=True)):
            expected = split_neurons(neurons, split.tiers[network].tolist(), network, reference)
            assert split.hot[slot, : split.hot_counts[slot]].tolist() == expected.hot
            assert split.cold[slot, : split.cold_counts[slot]].tolist() == expected.cold
            places = [0, *(len(expected.cold) * (share + 1) // NUM_SHARES for share in range(NUM_SHARES))]
            for share, (first, last) in enumerate(pairwise(places)):
                before = sum(neuron in expected.missing for neuron in expected.cold[:last])
                assert split.needed[slot, share] == (missed + before if last > first else 0)
            missed += len(expected.missing)
            on_disk = sum(split.tiers[network][neuron] == DISK for neuron in neurons)
            hits, misses = hits + on_disk - len(expected.missing), misses + len(expected.missing)
            hot, cold = hot + len(expected.hot), cold + len(expected.cold)
        assert split.word(layout.NUM_MISSES) == missed
    counts = split.cache.counts()
    assert (counts.disk_hits, counts.disk_misses, counts.hot_neurons, counts.cold_neurons) == (hits, misses, hot, cold)
    assert hits > misses > split.num_slots / 2, "both happen often, and slots are given away"
    base, placed = split.word(layout.SLOTS), split.homes & ~layout.TIER_BITS
    for (network, neuron), place in reference.place_of.items():
        assert placed[network, neuron] == base + place * BUNDLE_BYTES
    assert (placed[split.tiers == DISK] != 0).sum() == len(reference.place_of)


def test_what_is_asked_for_often_outlives_what_was_asked_for_once():
    cache = NeuronCache(4)
    for _ in range(MOST_ASKED):
        cache.begin_layer()
        cache.ask((0, 0))
    for neuron in range(1, 12):
        cache.begin_layer()
        cache.ask((0, neuron))
    cache.begin_layer()
    assert cache.ask((0, 0))
    assert not cache.ask((0, 1))


def test_neurons_side_by_side_are_one_read(split):
    network = 0
    on_disk = [idx for idx in range(NUM_NEURONS) if split.tiers[network][idx] == DISK]
    runs = 1 + sum(after != before + 1 for before, after in pairwise(on_disk))
    split.run([network, 1], [on_disk, []])
    assert split.word(layout.NUM_MISSES) == len(on_disk)
    assert split.word(layout.NUM_READS) == runs < len(on_disk)
    for read in range(runs):
        place = split.word(layout.READS) + 8 * layout.READ_WORDS * read
        words_of = np.frombuffer(ctypes.string_at(place, 8 * layout.READ_WORDS), dtype=np.int64)
        assert words_of[layout.READ_OFFSET] % layout.PAGE == 0
        assert words_of[layout.READ_BYTES] % layout.PAGE == 0
        assert words_of[layout.READ_BYTES] <= split.word(layout.BUFFER_BYTES)


def test_without_predictor_every_neuron_is_split(tmp_path, lone_team):
    split = Split(tmp_path, lone_team, seed=4)
    split.program.operations[0].arguments[layout.SPLIT_SELECTED] = 0
    split.run([2, 0], [[], []])
    for slot, network in enumerate((2, 0)):
        assert split.hot[slot, : split.hot_counts[slot]].tolist() == np.flatnonzero(split.tiers[network] == 0).tolist()
        assert split.hot_counts[slot] + split.cold_counts[slot] == NUM_NEURONS
    os.close(split.file)
