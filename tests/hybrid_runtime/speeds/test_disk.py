"""A real measurement of the disk that tests write to, small and short."""

import os

import pytest

from hybrid_runtime.speeds import disk as module
from hybrid_runtime.speeds.disk import measure_disk


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    monkeypatch.setattr(module, "FILE_BYTES", 8 << 20)
    monkeypatch.setattr(module, "MEASURED_S", 0.05)


def test_figures_are_positive_and_nothing_is_left(tmp_path):
    speeds = measure_disk(tmp_path)
    assert speeds.small_reads_per_s > 0
    assert speeds.bytes_per_s > 0
    assert list(tmp_path.iterdir()) == []


def test_where_the_page_cache_cannot_be_left_out_it_says_so(tmp_path, monkeypatch):
    opened = os.open

    def refuses_direct(path, flags, *arguments, **options):
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refuses_direct)
    speeds = measure_disk(tmp_path)
    assert not speeds.past_cache
    assert speeds.small_reads_per_s > 0
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_no_file_and_no_descriptor(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()  # noqa: PTH112, PTH208
    with pytest.raises(OSError, match="Input/output error"):
        measure_disk(tmp_path)
    after = set(os.listdir("/proc/self/fd")) if before else set()  # noqa: PTH208
    assert len(after) <= len(before)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        measure_disk(tmp_path / "none")


@pytest.mark.parametrize("size", module.BLOCK_BYTES)
def test_reads_lie_inside_the_file_at_whole_blocks(size):
    offsets = module._offsets(size, 0)
    found = [next(offsets) for _ in range(1000)]
    assert all(offset % size == 0 and 0 <= offset <= module.FILE_BYTES - size for offset in found)
    assert len(set(found)) > 100
