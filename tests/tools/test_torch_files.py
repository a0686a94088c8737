"""torch.save's files are data: sizes first, tensors only, every refusal names the file."""

import zipfile

import pytest
import torch

from hybrid_runtime.errors import CheckpointError
from hybrid_tools.torch_files import SPARE_BYTES, read_torch_file


def test_tensors_come_back(tmp_path):
    torch.save({"a": torch.arange(5), "b": torch.ones(2, 3)}, tmp_path / "file.pt")
    found = read_torch_file(tmp_path / "file.pt", 64)
    assert torch.equal(found["a"], torch.arange(5))
    assert torch.equal(found["b"], torch.ones(2, 3))


class Command:
    """Pickles into a call."""

    def __reduce__(self):
        return (print, ("ran",))


def zip_of_zeros(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", bytes(2 * SPARE_BYTES))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b"text"), "is not a file that torch.save writes"),
        (lambda path: torch.save(torch.zeros(SPARE_BYTES), path), r"is \d+ bytes, expected at most"),
        (zip_of_zeros, r"unpacks to \d+ bytes, expected at most"),
        (lambda path: torch.save(Command(), path), "holds more than tensors, or is damaged"),
    ],
    ids=["missing", "text", "large", "unpacks large", "code"],
)
def test_everything_else_is_refused_by_name(tmp_path, write, message, capsys):
    path = tmp_path / "file.pt"
    write(path)
    with pytest.raises(CheckpointError, match=message) as refused:
        read_torch_file(path, 64)
    assert str(path) in str(refused.value)
    assert capsys.readouterr().out == ""  # nothing ran
