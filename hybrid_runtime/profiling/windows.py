"""Text files as windows of token ids, the same ones in the same order at every reading."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from hybrid_runtime.errors import UsageError
from hybrid_runtime.progress import NoProgress, Progress
from hybrid_runtime.text.documents import check_text_file, read_documents
from hybrid_runtime.text.tokenizer import Tokenizer

CHUNK_BYTES = 1 << 22
PIECE_CHARACTERS = 1 << 16  # of a document that become tokens at once: it may be a whole library


def text_digest(files: Sequence[Path], progress: Progress | None = None) -> str:
    """Hex sha256 of the files' own digests, in order. Raise UsageError for one that is not there."""
    progress = progress or NoProgress()
    for path in files:
        check_text_file(path)
    total = hashlib.sha256()
    progress.start("looking at the text", sum(path.stat().st_size for path in files))
    try:
        for path in files:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
                    progress.advance(len(chunk))
            total.update(digest.digest())
    finally:
        progress.done()
    return total.hexdigest()


def token_windows(files: Sequence[Path], tokenizer: Tokenizer, window: int) -> Iterator[torch.Tensor]:
    """int64 [window] each; a document runs on from one window into the next, what fills no window is left out.

    A long document is cut before a space, where most tokenizers cut too, and is never held as tokens. Documents are
    taken from the files in turn, so that a beginning of the whole holds something of every file.
    """
    tokens: list[int] = []
    for document in _in_turn([read_documents(path) for path in files]):
        for idx, piece in enumerate(_pieces(document)):
            tokens += tokenizer.encode(piece, add_special=idx == 0)
            whole = len(tokens) - len(tokens) % window
            for start in range(0, whole, window):
                yield torch.tensor(tokens[start : start + window])
            del tokens[:whole]


def _pieces(document: str) -> Iterator[str]:
    start = 0
    while len(document) - start > PIECE_CHARACTERS:
        space = document.rfind(" ", start + 1, start + PIECE_CHARACTERS)
        end = start + PIECE_CHARACTERS if space < 0 else space
        yield document[start:end]
        start = end
    yield document[start:]


def _in_turn(streams: list[Iterator[str]]) -> Iterator[str]:
    while streams:
        left = []
        for stream in streams:
            document = next(stream, None)
            if document is not None:
                yield document
                left.append(stream)
        streams = left


def require_windows(num_windows: int, files: Sequence[Path], window: int) -> None:
    """Raise UsageError when a text gave no window to count."""
    if num_windows == 0:
        names = ", ".join(map(str, files))
        raise UsageError(f"--text {names}: has fewer than {window} tokens; give more text, or a smaller --window")
