"""Our safetensors files: whole or absent, and refused by name when they are not what was expected."""

import stat

import pytest
import torch

from hybrid_runtime.errors import BudgetError, CheckpointError
from hybrid_runtime.tensor_files import read_metadata, read_tensors, write_tensors

EXPECTED = {"a": ((2, None), torch.float32)}


def test_files_are_readable_for_others(tmp_path):
    write_tensors(tmp_path / "model.safetensors", {"a": torch.ones(2)}, {})
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) & 0o444 == 0o444


def test_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(BudgetError, match=r"nowhere.*could not be written"):
        write_tensors(tmp_path / "nowhere" / "model.safetensors", {"a": torch.ones(2)}, {})
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_is_read_back(tmp_path):
    tensors = {"a": torch.randn(2, 3)}
    write_tensors(tmp_path / "a.safetensors", tensors, {"step": "3"})
    assert torch.equal(read_tensors(tmp_path / "a.safetensors", EXPECTED, "again")["a"], tensors["a"])
    assert read_metadata(tmp_path / "a.safetensors", "again") == {"step": "3"}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"b": torch.ones(2, 3)}, "lacks or adds a, b; do it again"),
        ({"a": torch.ones(3, 3)}, r"a has shape \(3, 3\), expected \(2, any\); do it again"),
        ({"a": torch.ones(2)}, r"a has shape \(2,\)"),
        ({"a": torch.ones(2, 3).half()}, r"a is torch.float16, expected torch.float32; do it again"),
    ],
    ids=["names", "shape", "rank", "dtype"],
)
def test_other_tensors_are_refused(tmp_path, tensors, message):
    write_tensors(tmp_path / "a.safetensors", tensors, {})
    with pytest.raises(CheckpointError, match=message):
        read_tensors(tmp_path / "a.safetensors", EXPECTED, "do it again")


def test_files_that_are_not_there_or_broken_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"a\.safetensors: is missing; do it again"):
        read_tensors(tmp_path / "a.safetensors", EXPECTED, "do it again")
    (tmp_path / "a.safetensors").write_bytes(b"no such thing")
    for read in (lambda path: read_tensors(path, EXPECTED, "do it again"), lambda path: read_metadata(path, "do it")):
        with pytest.raises(CheckpointError, match=r"a\.safetensors: cannot be read as safetensors"):
            read(tmp_path / "a.safetensors")


def test_what_a_kill_left_under_the_librarys_own_name_is_removed(tmp_path):
    (tmp_path / ".tmpa1B2c3").write_bytes(b"half")
    (tmp_path / ".tmp").write_bytes(b"somebody's")
    write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp", "a.safetensors"]
