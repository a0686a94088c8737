"""Text files as documents: where they are cut, which are held out, what is refused."""

import gzip
import time

import pytest

from hybrid_runtime.errors import UsageError
from hybrid_runtime.text import documents
from hybrid_runtime.text.documents import read_documents
from hybrid_tools.training.documents import TextFile, is_held_out, parse_text_file, refuse_empty

TEXT = "One.\n<|endoftext|>\n\n  Two,\n\nwith a gap. \n<|endoftext|>\n \n<|endoftext|>Drei ä€😀"
DOCUMENTS = ["One.", "Two,\n\nwith a gap.", "Drei ä€😀"]


@pytest.mark.parametrize("piece", [1, 3, 7, 1 << 20])
@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz"])
def test_documents_are_the_same_however_the_file_is_read(name, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_CHARACTERS", piece)
    data = TEXT.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert list(read_documents(tmp_path / name)) == DOCUMENTS


def test_a_long_document_takes_time_in_proportion(tmp_path, monkeypatch):
    """16 times the text in pieces; in quadratic time it would take 256 times as long."""
    monkeypatch.setattr(documents, "PIECE_CHARACTERS", 1 << 10)
    seconds = []
    for size in (1 << 20, 1 << 24):
        (tmp_path / "long.txt").write_text("word " * (size // 5))
        started = time.process_time()
        (document,) = read_documents(tmp_path / "long.txt")
        seconds.append(time.process_time() - started)
        assert len(document) == size // 5 * 5 - 1
    assert seconds[1] < 80 * max(seconds[0], 0.005)


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("latin.txt", b"caf\xe9", "is not UTF-8 text"),
        ("not.gz", b"plain", "is not a whole gzip file"),
        ("cut.gz", gzip.compress(TEXT.encode() * 50)[:-20], "is not a whole gzip file"),
    ],
    ids=["latin-1", "no-gzip", "cut-short"],
)
def test_what_is_no_text_is_named(name, data, match, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=match):
        list(read_documents(tmp_path / name))


def test_document_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_CHARACTERS", 10)
    monkeypatch.setattr(documents, "LONGEST_DOCUMENT", 100)
    (tmp_path / "long.txt").write_text("word " * 50)
    with pytest.raises(UsageError, match=r"longer than 100 characters; separate documents by <\|endoftext\|>"):
        list(read_documents(tmp_path / "long.txt"))


@pytest.mark.parametrize(
    ("suffix", "weight"), [("", 1.0), ("@4", 4.0), ("@0.25", 0.25)], ids=["none", "whole", "fraction"]
)
def test_weight_follows_the_path(suffix, weight, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("x")
    assert parse_text_file(f"{path}{suffix}") == TextFile(path, weight)


def test_an_at_sign_in_a_name_is_a_name(tmp_path):
    path = tmp_path / "me@home.txt"
    path.write_text("x")
    assert parse_text_file(str(path)) == TextFile(path)
    assert parse_text_file(f"{path}@2") == TextFile(path, 2.0)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "1000"])
def test_weights_that_make_no_sense_are_refused(weight, tmp_path):
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(UsageError, match="the weight must be above 0"):
        parse_text_file(f"{tmp_path / 'text.txt'}@{weight}")


def test_held_out_depends_on_words_alone_and_keeps_its_share():
    texts = [f"document number {idx}" for idx in range(20_000)]
    held = [text for text in texts if is_held_out(text, 0.05)]
    assert len(held) / len(texts) == pytest.approx(0.05, abs=0.006)
    assert all(is_held_out(f"  {text}\n".replace(" ", "\n"), 0.05) for text in held)
    assert {text for text in texts if is_held_out(text, 0.02)} < set(held)  # a larger share only adds
    assert not any(is_held_out(text, 0.0) for text in texts)


def test_a_file_that_is_all_held_out_says_so(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("the only document")
    refuse_empty([TextFile(path)], 0.0)
    with pytest.raises(UsageError, match=r"--held-out 0.999999 keeps all of them for testing"):
        refuse_empty([TextFile(path)], 0.999999)
