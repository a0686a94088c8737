"""Plain text as documents: files, plain or gzip, in which `<|endoftext|>` parts one document from the next.

A file is read in pieces, never whole. Which documents are held out depends on their words alone, so that every model
trained on the same text, today or in a year, is tested on the same documents, and a document that stands in two files
is never in both halves.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from hybrid_runtime.errors import UsageError

SEPARATOR = "<|endoftext|>"
PIECE_CHARACTERS = 1 << 20
LONGEST_DOCUMENT = 1 << 28  # characters held at once; a file without separators is one document
SALT = "hybrid-train held-out"


@dataclass(frozen=True, slots=True)
class TextFile:
    """One file of documents. weight: how often an epoch reads each document; 0.5 reads every second one."""

    path: Path
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Raise UsageError for a weight that is not above 0 and below 1000."""
        if not 0 < self.weight < 1000:
            raise UsageError(f"--text {self.path}@{self.weight:g}: the weight must be above 0 and below 1000")


def parse_text_file(text: str) -> TextFile:
    """`PATH` or `PATH@WEIGHT`; raise UsageError for a file that is not there."""
    path, at, weight = text.rpartition("@")
    if not at or Path(text).is_file():  # an @ in the name itself
        path, weight = text, "1"
    try:
        file = TextFile(Path(path), float(weight))
    except ValueError:
        file = TextFile(Path(text))
    if file.path.is_dir():
        raise UsageError(f"--text {file.path}: is a folder; name its files, each with --text")
    if not file.path.is_file():
        raise UsageError(f"--text {file.path}: no such file")
    return file


def read_documents(path: Path) -> Iterator[str]:
    """The file's documents in order, without empty ones. Raise UsageError for what is no text."""
    try:
        with _open_text(path) as stream:
            yield from _split(path, stream)
    except UnicodeDecodeError as error:
        raise UsageError(f"--text {path}: is not UTF-8 text: {error.reason}; convert it first") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"--text {path}: is not a whole gzip file: {error}; fetch it again") from error
    except OSError as error:
        raise UsageError(f"--text {path}: cannot be read: {error.strerror or error}") from error


def refuse_empty(files: Sequence[TextFile], held_out: float) -> None:
    """Raise UsageError for a file without a document to train on, before any work."""
    for file in files:
        if not any(not is_held_out(document, held_out) for document in read_documents(file.path)):
            is_empty = next(read_documents(file.path), None) is None
            raise UsageError(
                f"--text {file.path}: holds no document to train on"
                + ("" if is_empty else f": --held-out {held_out} keeps all of them for testing; use a smaller share")
            )


def is_held_out(document: str, share: float) -> bool:
    """Whether this document is for testing; a function of its words and the share alone."""
    digest = hashlib.sha256(f"{SALT}\n{' '.join(document.split())}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2.0**64


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="\n")
    return path.open(encoding="utf-8", newline="\n")


def _split(path: Path, stream: TextIO) -> Iterator[str]:
    """Cut at separators; every character is looked at once, however long a document is."""
    pieces: list[str] = []  # of the document that is being read
    length = 0
    rest = ""  # the end of what was read, too short to hold a whole separator
    while piece := stream.read(PIECE_CHARACTERS):
        *ended, rest = (rest + piece).split(SEPARATOR)
        for idx, end in enumerate(ended):
            if document := "".join([*pieces, end] if idx == 0 else [end]).strip():
                yield document
        if ended:
            pieces, length = [], 0
        keep = min(len(rest), len(SEPARATOR) - 1)
        pieces.append(rest[: len(rest) - keep])
        length += len(pieces[-1])
        rest = rest[len(rest) - keep :]
        if length > LONGEST_DOCUMENT:
            raise UsageError(
                f"--text {path}: a document is longer than {LONGEST_DOCUMENT} characters; "
                f"separate documents by {SEPARATOR}"
            )
    if document := "".join([*pieces, rest]).strip():
        yield document
