"""The documents that a run trains on, and those that it keeps for testing.

Which documents are held out depends on their words alone, so that every model
trained on the same text, today or in a year, is tested on the same documents, and a document that stands in two files
is never in both halves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrid_runtime.errors import UsageError
from hybrid_runtime.text.documents import check_text_file, read_documents

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
    check_text_file(file.path)
    return file


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
