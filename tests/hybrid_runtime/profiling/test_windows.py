"""Text as windows: every token once and in order, files in turn, and no more of a text held than a piece."""

from __future__ import annotations

import gzip
import hashlib
import tracemalloc

import pytest
import torch

from hybrid_runtime.errors import UsageError
from hybrid_runtime.profiling import windows as module
from hybrid_runtime.profiling.windows import require_windows, text_digest, token_windows
from hybrid_runtime.text import documents
from hybrid_runtime.text.documents import SEPARATOR
from hybrid_runtime.text.load import load_tokenizer
from tests.hybrid_runtime.small_models import BOS, write_tokenizer

from .conftest import Heard

DOCUMENTS = ["Hello world and the rest", "a", "once upon a time", "  spaces within  stay ", "é漢字🙂 the end"]


class Bytes:
    """A tokenizer whose ids are bytes, after a BOS of 256."""

    def __init__(self):
        self.encoded = []

    def encode(self, text, *, add_special=True):
        self.encoded.append(text)
        return [256] * add_special + list(text.encode())


def ids(*texts):
    return [each for text in texts for each in (256, *text.encode())]


def write(folder, name, *documents):
    path = folder / name
    path.write_text(SEPARATOR.join(documents), encoding="utf-8", newline="")
    return path


def flat(windows):
    return torch.cat([*windows, torch.zeros(0, dtype=torch.int64)]).tolist()


@pytest.mark.parametrize("window", [1, 2, 7, 30, 1000])
def test_windows_are_the_documents_one_after_another(tmp_path, window):
    found = list(token_windows([write(tmp_path, "text", *DOCUMENTS)], Bytes(), window))
    expected = ids(*(each.strip() for each in DOCUMENTS))
    assert all(len(tokens) == window and tokens.dtype == torch.int64 for tokens in found)
    assert flat(found) == expected[: len(expected) // window * window]


def test_files_take_turns_until_each_is_empty(tmp_path):
    files = [write(tmp_path, "a", "a1", "a2", "a3"), write(tmp_path, "b", "b1"), write(tmp_path, "c", "c1", "", "c2")]
    tokenizer = Bytes()
    list(token_windows(files, tokenizer, 2))
    assert tokenizer.encoded == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_every_reading_gives_the_same_windows(tmp_path):
    files = [write(tmp_path, name, *DOCUMENTS[start:]) for name, start in (("a", 0), ("b", 2))]
    first, second = (list(token_windows(files, Bytes(), 5)) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    tokenizer = Bytes()
    windows = token_windows([write(tmp_path, "text", *DOCUMENTS)], tokenizer, 4)
    assert tokenizer.encoded == []
    next(windows)
    assert tokenizer.encoded == DOCUMENTS[:1]


@pytest.mark.parametrize("length", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("text", ["a b c", "one two  three   four", "nospaceatall" * 3, " ", "ab " * 9])
def test_a_long_document_in_pieces_is_the_same_text(tmp_path, monkeypatch, length, text):
    """With one BOS; cut before a space wherever there is one."""
    monkeypatch.setattr(module, "PIECE_CHARACTERS", length)
    tokenizer = Bytes()
    found = flat(token_windows([write(tmp_path, "text", text)], tokenizer, 1))
    assert found == (ids(text.strip()) if text.strip() else [])
    assert "".join(tokenizer.encoded) == text.strip()
    assert all(0 < len(each) <= length for each in tokenizer.encoded)
    for piece in tokenizer.encoded[1:]:
        assert piece[0] == " " or " " not in text.strip()[:-1] or length <= len("three")


def test_pieces_give_a_real_tokenizer_s_own_tokens(tmp_path, monkeypatch):
    """Byte-level BPE cuts before a space itself."""
    write_tokenizer(tmp_path)
    tokenizer, text = load_tokenizer(tmp_path), "Hello the world and once upon a time, " * 20
    expected = tokenizer.encode(text.strip())
    assert expected[0] == BOS
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 50)
    assert flat(token_windows([write(tmp_path, "text", text)], tokenizer, 1)) == expected


@pytest.mark.parametrize("separator", [SEPARATOR, " "], ids=["documents", "one-document"])
def test_tokens_of_a_long_text_are_not_held(tmp_path, monkeypatch, separator):
    """Sixteen times the text, the same memory, but for the characters of a text that is one document."""
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 1 << 12)
    monkeypatch.setattr(documents, "PIECE_CHARACTERS", 1 << 12)

    def peak(length):
        path = tmp_path / f"{length}"
        path.write_text(separator.join(["word " * 200] * (length // 1000)))
        tokenizer = Bytes()
        tokenizer.encoded = type("Nowhere", (), {"append": lambda self, text: None})()
        tracemalloc.start()
        try:
            count = sum(len(tokens) for tokens in token_windows([path], tokenizer, 512))
            assert count > 0.98 * length
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    short, long = 1 << 16, 1 << 20
    document = 3 * (long - short) if separator == " " else 0  # in pieces, joined, and stripped: a byte a character
    assert peak(long) < peak(short) + document + (1 << 18)  # of a mebibyte: other threads of the tests allocate too


def test_digest_is_of_the_files_and_their_order(tmp_path):
    first, second = write(tmp_path, "a", "a"), write(tmp_path, "b", "b")
    each = [hashlib.sha256(text).digest() for text in (b"a", b"b")]
    assert text_digest([first, second]) == hashlib.sha256(b"".join(each)).hexdigest()
    assert text_digest([second, first]) != text_digest([first, second])
    assert text_digest([write(tmp_path, "ab", "ab")]) != text_digest([first, second])


def test_digest_reads_in_chunks(tmp_path, monkeypatch):
    path = write(tmp_path, "text", *DOCUMENTS)
    whole = text_digest([path])
    monkeypatch.setattr(module, "CHUNK_BYTES", 3)
    assert text_digest([path]) == whole


def test_digest_tells_how_many_bytes_it_has_read(tmp_path):
    heard, files = Heard(), [write(tmp_path, "a", "a" * 100), write(tmp_path, "b", "b" * 50)]
    text_digest(files, heard)
    assert heard.steps == [["looking at the text", 150, "bytes", 150]]
    assert not heard.running


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"--text .*none: no such file"):
        text_digest([tmp_path / "none"])
    with pytest.raises(UsageError, match=r"is a folder; name its files, each with --text"):
        text_digest([tmp_path])


def test_text_that_fills_no_window_is_refused_by_name(tmp_path):
    files = [write(tmp_path, "a", "short"), write(tmp_path, "b", "")]
    assert list(token_windows(files, Bytes(), 100)) == []
    with pytest.raises(UsageError, match=r"--text .*a, .*b: has fewer than 100 tokens; give more text, or a smaller"):
        require_windows(0, files, 100)
    require_windows(1, files, 100)


def test_gzip_that_ends_early_is_refused_after_its_windows(tmp_path, monkeypatch):
    path = tmp_path / "text.gz"
    with gzip.open(path, "wt") as file:
        file.write(SEPARATOR.join(f"{idx} {idx**9}" for idx in range(5000)))
    path.write_bytes(path.read_bytes()[:-1000])
    monkeypatch.setattr(documents, "PIECE_CHARACTERS", 1 << 12)
    windows = token_windows([path], Bytes(), 512)
    assert len(next(windows)) == 512
    with pytest.raises(UsageError, match=r"text\.gz: is not a whole gzip file"):
        list(windows)
