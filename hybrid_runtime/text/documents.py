"""Plain text as documents: files, plain or gzip, in which `<|endoftext|>` parts one document from the next.

A file is read in pieces, never whole.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from hybrid_runtime.errors import UsageError

SEPARATOR = "<|endoftext|>"
PIECE_CHARACTERS = 1 << 20
LONGEST_DOCUMENT = 1 << 28  # characters held at once; a file without separators is one document


def check_text_file(path: Path) -> None:
    """Raise UsageError for what is no file."""
    if path.is_dir():
        raise UsageError(f"--text {path}: is a folder; name its files, each with --text")
    if not path.is_file():
        raise UsageError(f"--text {path}: no such file")


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
