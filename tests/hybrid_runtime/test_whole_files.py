"""Files that are there whole or not at all."""

import errno
import os

import pytest

from hybrid_runtime.whole_files import write_whole


def test_a_full_disk_names_the_file_and_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    write_whole(path, b"before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_whole(path, b"after")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
