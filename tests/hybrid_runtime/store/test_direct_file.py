"""Ranges of files read past the page cache are the file's bytes; what cannot be read names the file and the place."""

import gc
import os

import pytest
import torch

from hybrid_runtime.errors import StoreError
from hybrid_runtime.store.direct_file import PAGE, DirectFile, page_aligned, pages_around

SIZE = 5 * PAGE + 123


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "bytes.bin"
    file.write_bytes(bytes(torch.randint(256, (SIZE,), generator=torch.Generator().manual_seed(1)).tolist()))
    return file


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (PAGE - 1, PAGE + 1), (3, SIZE), (PAGE, 2 * PAGE), (5 * PAGE, SIZE), (SIZE - 1, SIZE)]
)
def test_a_range_is_the_files_bytes(path, start, stop):
    buffer = page_aligned(pages_around(stop - start))
    assert buffer.data_ptr() % PAGE == 0
    with DirectFile(path) as file:
        assert file.read(start, stop, buffer).numpy().tobytes() == path.read_bytes()[start:stop]


def test_pages_around_hold_the_range_wherever_it_begins():
    for size in (1, PAGE - 1, PAGE, PAGE + 1, 6912):
        needed = max(-(-(start + size) // PAGE) for start in range(PAGE)) * PAGE
        assert pages_around(size) == needed


def test_a_file_that_ends_before_is_refused_by_name(path):
    with DirectFile(path) as file, pytest.raises(StoreError, match=rf"bytes\.bin: ends at byte {SIZE}, expected"):
        file.read(SIZE - 10, SIZE + 1, page_aligned(2 * PAGE))


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(StoreError, match=r"none\.bin: cannot be opened: No such file"):
        DirectFile(tmp_path / "none.bin")


def test_who_is_forgotten_holds_no_file(path):
    file = DirectFile(path)
    descriptor = file.descriptor
    os.fstat(descriptor)
    del file
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
