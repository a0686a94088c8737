"""Blocks of memory and their filling: the file's bytes in either mode, once, and a file that shrank refused by name."""

import os
import random
import subprocess
import sys
import warnings

import pytest
import torch

from hybrid_kernels.packed_matrix import Bundles, PackedMatrix
from hybrid_runtime.errors import StoreError
from hybrid_runtime.store import parallel_read
from hybrid_runtime.store.memory import HUGE_PAGE, LOAD_MODES, anonymous_block, mapped_block
from hybrid_runtime.store.parallel_read import CHUNK_BYTES, Filling, belongs_in_page_cache, fill
from hybrid_runtime.store.reader import open_store

from .small_store import CONFIGS, write_store

SIZES = [1, 4095, 4096, 4097, HUGE_PAGE - 1, HUGE_PAGE, CHUNK_BYTES + 12345, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES + 4096]
MIB = 1 << 20


def random_file(path, num_bytes):
    path.write_bytes(random.Random(num_bytes).randbytes(num_bytes))
    return path


def filled(path, num_bytes, *, past_cache, num_threads):
    block = anonymous_block(num_bytes)
    fill([Filling(path, block)], past_cache=past_cache, num_threads=num_threads)
    return block


@pytest.mark.parametrize("past_cache", [False, True], ids=["through-the-cache", "past-the-cache"])
@pytest.mark.parametrize("num_threads", [1, 2, 7])
@pytest.mark.parametrize("num_bytes", SIZES)
def test_blocks_hold_the_files_bytes(tmp_path, num_bytes, num_threads, past_cache):
    path = random_file(tmp_path / "part", num_bytes)
    block = filled(path, num_bytes, past_cache=past_cache, num_threads=num_threads)
    assert block.dtype == torch.uint8
    assert block.numpy().tobytes() == path.read_bytes()


def test_many_files_of_odd_sizes_fill_their_own_blocks(tmp_path):
    sizes = [1, 77, 4096, 100_001, CHUNK_BYTES + 1]
    fillings = [Filling(random_file(tmp_path / str(size), size), anonymous_block(size)) for size in sizes]
    fill(fillings, past_cache=False)
    for filling in fillings:
        assert filling.block.numpy().tobytes() == filling.path.read_bytes()


def test_a_longer_file_gives_its_beginning(tmp_path):
    path = random_file(tmp_path / "part", 10_000)
    assert filled(path, 5000, past_cache=True, num_threads=2).numpy().tobytes() == path.read_bytes()[:5000]


def test_a_file_system_without_direct_reads_is_read_all_the_same(tmp_path, monkeypatch):
    opened = []

    def refuse(path, flags, *args, real=os.open, **kwargs):
        opened.append(flags)
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(22, "Invalid argument")
        return real(path, flags, *args, **kwargs)

    path = random_file(tmp_path / "part", CHUNK_BYTES + 5)
    monkeypatch.setattr(os, "open", refuse)
    block = filled(path, CHUNK_BYTES + 5, past_cache=True, num_threads=1)
    monkeypatch.undo()
    assert block.numpy().tobytes() == path.read_bytes()
    assert opened or not hasattr(os, "O_DIRECT")


@pytest.mark.parametrize("past_cache", [False, True], ids=["through-the-cache", "past-the-cache"])
def test_a_short_file_is_refused_before_a_byte_is_read(tmp_path, past_cache):
    whole, short = random_file(tmp_path / "whole", 5000), random_file(tmp_path / "short", 4999)
    fillings = [Filling(whole, anonymous_block(5000)), Filling(short, anonymous_block(5000))]
    with pytest.raises(StoreError, match=r"short: ends at byte 4999, expected 5000; convert the model again"):
        fill(fillings, past_cache=past_cache)
    assert not fillings[0].block.any()


@pytest.mark.parametrize("past_cache", [False, True], ids=["through-the-cache", "past-the-cache"])
def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path, monkeypatch, past_cache):
    path = random_file(tmp_path / "part", CHUNK_BYTES + 100)
    monkeypatch.setattr(parallel_read, "_check_size", lambda _: None)  # it shrank after that
    with pytest.raises(StoreError, match=rf"part: ends at byte {CHUNK_BYTES + 100}, expected {3 * CHUNK_BYTES}"):
        filled(path, 3 * CHUNK_BYTES, past_cache=past_cache, num_threads=1)


def test_what_the_disk_cannot_read_is_refused_with_the_files_name(tmp_path):
    (tmp_path / "part").mkdir()
    with pytest.raises(StoreError, match=r"part: cannot be read at byte 0: Is a directory"):
        filled(tmp_path / "part", 1, past_cache=False, num_threads=1)


def test_more_than_the_machine_has_is_a_memory_error():
    with pytest.raises(MemoryError):
        anonymous_block(1 << 52)


@pytest.mark.parametrize("num_bytes", [1, 4097, 3 * HUGE_PAGE + 1])
def test_blocks_start_at_a_huge_page_and_outlive_their_maker(num_bytes):
    blocks = [anonymous_block(num_bytes) for _ in range(3)]
    for value, block in enumerate(blocks):
        assert block.data_ptr() % HUGE_PAGE == 0
        block.fill_(value)
    assert [int(block.sum()) for block in blocks] == [0, num_bytes, 2 * num_bytes]


@pytest.mark.parametrize("num_bytes", [1, 4095, 4097, HUGE_PAGE + 1])
def test_a_mapped_block_is_the_file_without_a_warning(tmp_path, num_bytes):
    path = random_file(tmp_path / "part", num_bytes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block = mapped_block(path, num_bytes)
    assert block.numpy().tobytes() == path.read_bytes()


def test_nothing_written_to_a_mapped_block_reaches_the_file(tmp_path):
    path = random_file(tmp_path / "part", 5000)
    before = path.read_bytes()
    mapped_block(path, 5000).zero_()
    assert path.read_bytes() == before


def test_a_short_file_is_not_mapped(tmp_path):
    path = random_file(tmp_path / "part", 4999)
    with pytest.raises(StoreError, match=r"part: ends at byte 4999, expected 5000; convert the model again"):
        mapped_block(path, 5000)


def test_only_what_is_small_stays_in_the_page_cache():
    assert belongs_in_page_cache(256 * MIB)
    assert not belongs_in_page_cache(256 * MIB + 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_both_ways_of_loading_give_the_same_weights(tmp_path, name):
    write_store(tmp_path, name)
    store = open_store(tmp_path)
    read, mapped = (store.read_parts(store.manifest.parts, load, num_threads=2) for load in LOAD_MODES)
    assert len(read) == len(mapped) == len(store.manifest.parts)
    for ours, theirs in zip(read, mapped, strict=True):
        assert ours.keys() == theirs.keys()
        for weight_name, weight in ours.items():
            assert torch.equal(bytes_of(weight), bytes_of(theirs[weight_name]))


def bytes_of(weight):
    if isinstance(weight, Bundles | PackedMatrix):
        return weight.data if isinstance(weight, Bundles) else weight.rows
    return weight.view(torch.uint8)


@pytest.mark.parametrize("load", LOAD_MODES)
def test_a_part_that_shrinks_after_opening_is_refused_in_both_modes(tmp_path, load):
    write_store(tmp_path)
    store = open_store(tmp_path)
    part = store.manifest.parts[1]
    path = store.data_folder / part.file
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StoreError, match=rf"{part.file}: ends at byte {part.num_bytes - 100}, expected"):
        store.read_parts(store.manifest.parts, load)


# A process of its own, whose peak is nothing but the load's.
LOAD = """
import sys
from pathlib import Path
from hybrid_runtime.machine import current_rss_bytes, huge_page_bytes, peak_rss_bytes
from hybrid_runtime.store.memory import anonymous_block, mapped_block
from hybrid_runtime.store.parallel_read import Filling, fill
paths = [Path(name) for name in sys.argv[2:]]
before = current_rss_bytes()
if sys.argv[1] == "mmap":
    blocks = [mapped_block(path, path.stat().st_size) for path in paths]
else:
    blocks = [anonymous_block(path.stat().st_size) for path in paths]
    fill([Filling(path, block) for path, block in zip(paths, blocks)], past_cache=sys.argv[1] == "past")
print(peak_rss_bytes() - before, huge_page_bytes())
"""


@pytest.mark.parametrize("mode", ["through", "past", "mmap"])
def test_a_load_takes_the_weights_bytes_once(tmp_path, mode):
    sizes = [40 * MIB + 1, 17 * MIB - 1, 3 * MIB, MIB // 2]
    paths = [str(random_file(tmp_path / str(size), size)) for size in sizes]
    result = subprocess.run(
        [sys.executable, "-c", LOAD, mode, *paths], capture_output=True, text=True, check=True, timeout=60
    )
    grown, in_huge_pages = map(int, result.stdout.split())
    print(f"{mode}: {grown / MIB:.1f} MiB for {sum(sizes) / MIB:.1f}, {in_huge_pages / MIB:.0f} in huge pages")
    assert grown < (4 * MIB if mode == "mmap" else sum(sizes) + 4 * MIB)  # torch and threads take a little too
