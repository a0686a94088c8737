"""The run's text as tokens on disk, and the batches that a step reads: a function of the seed and the step alone.

Every document is kept once, BOS + words + EOS, in one file of 32-bit ids that is mapped and never read whole. An epoch
is an order of documents, each as often as its file's weight says, laid end to end and cut into sequences, which are
shuffled; attention crosses from one document to the next, as is usual. What comes at step n needs no state beyond n: a
run that was killed goes on with the very same batches.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hybrid_runtime.errors import CheckpointError, UsageError
from hybrid_runtime.text.documents import SEPARATOR, read_documents
from hybrid_runtime.text.tokenizer import Tokenizer
from hybrid_runtime.typed_json import from_json
from hybrid_tools.training.documents import TextFile, is_held_out
from hybrid_tools.training.json_files import read_json, remedy_for, write_json

TOKENS_FILE = "tokens.bin"
INDEX_FILE = "index.json"
HELD_OUT_FOLDER = "held_out"
_ID = np.dtype("<u4")

Ids = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FileCounts:
    """What one file gave: documents and tokens for training, documents held out; sha256 of the documents read.

    modified_ns: when the file was last written to, as the disk says.
    """

    name: str
    num_bytes: int
    modified_ns: int
    weight: float
    num_documents: int
    num_tokens: int
    num_held_out: int
    sha256: str


@dataclass(frozen=True, slots=True)
class CorpusIndex:
    """What tokens.bin holds, file by file, and how long each document is. held_out: share of documents left out."""

    held_out: float
    files: tuple[FileCounts, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Corpus:
    """tokens: all documents end to end; lengths: [documents]; weights: [documents], how often an epoch reads each."""

    tokens: Ids
    lengths: Counts
    weights: npt.NDArray[np.float64]
    index: CorpusIndex

    @property
    def tokens_per_epoch(self) -> float:
        """Expected tokens of one epoch, repeats included."""
        return float((self.lengths * self.weights).sum())

    def digest(self) -> str:
        """Hex digest of the texts and their weights: another corpus cannot continue a run."""
        parts = [f"{file.sha256}:{file.weight!r}" for file in self.index.files]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def refuse_other(self, files: Sequence[TextFile], held_out: float, where: str) -> None:
        """Raise UsageError when a run that is to go on names other files, weights or another held-out share."""
        asked = [(file.path.name, file.path.stat().st_size, file.weight) for file in files]
        found = [(file.name, file.num_bytes, file.weight) for file in self.index.files]
        if asked != found or held_out != self.index.held_out:
            raise UsageError(
                f"{where}: was made of {_listed(found)} with --held-out {self.index.held_out}, "
                f"asked for {_listed(asked)} with --held-out {held_out}; name another folder"
            )
        for file, counts in zip(files, self.index.files, strict=True):
            if file.path.stat().st_mtime_ns != counts.modified_ns and _digest(file) != counts.sha256:
                raise UsageError(f"--text {file.path}: has changed since {where} was made of it; name another folder")


def _digest(file: TextFile) -> str:
    digest = hashlib.sha256()
    for document in read_documents(file.path):
        digest.update(document.encode() + b"\0")
    return digest.hexdigest()


def _listed(files: Sequence[tuple[str, int, float]]) -> str:
    return ", ".join(f"{name}@{weight:g} ({num_bytes} bytes)" for name, num_bytes, weight in files)


def write_corpus(files: Sequence[TextFile], held_out: float, tokenizer: Tokenizer, folder: Path) -> None:
    """Tokenize every file into folder, held-out documents as text of their own.

    The index is written last: a folder without one is not finished.
    """
    held_out_folder = folder / HELD_OUT_FOLDER
    held_out_folder.mkdir(parents=True, exist_ok=True)
    counts, lengths = [], []
    with (folder / TOKENS_FILE).open("wb") as out:
        for idx, file in enumerate(files):
            before = file.path.stat()
            held_path = held_out_folder / f"{idx:02d}-{file.path.name.removesuffix('.gz')}"
            digest = hashlib.sha256()
            file_lengths = []
            num_held_out = 0
            with held_path.open("w", encoding="utf-8") as held:
                for document in read_documents(file.path):
                    digest.update(document.encode() + b"\0")
                    if is_held_out(document, held_out):
                        held.write(f"{document}\n{SEPARATOR}\n")
                        num_held_out += 1
                        continue
                    ids = document_ids(tokenizer, document)
                    out.write(np.asarray(ids, _ID).tobytes())
                    file_lengths.append(len(ids))
            assert file_lengths, f"{file.path} is empty"  # refuse_empty saw to it
            lengths += file_lengths
            counts.append(
                FileCounts(
                    file.path.name,
                    before.st_size,
                    before.st_mtime_ns,
                    file.weight,
                    len(file_lengths),
                    sum(file_lengths),
                    num_held_out,
                    digest.hexdigest(),
                )
            )
        out.flush()
        os.fsync(out.fileno())
    write_json(folder / INDEX_FILE, asdict(CorpusIndex(held_out, tuple(counts), tuple(lengths))), indent=None)


def open_corpus(folder: Path) -> Corpus:
    """Map what write_corpus wrote."""
    path = folder / INDEX_FILE
    try:
        index = from_json(CorpusIndex, read_json(path, (), folder), "index.json")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; {remedy_for(folder)}") from error
    lengths = np.asarray(index.lengths, np.int64)
    weights = np.repeat([file.weight for file in index.files], [file.num_documents for file in index.files])
    path = folder / TOKENS_FILE
    num_bytes = path.stat().st_size if path.is_file() else 0
    if num_bytes != lengths.sum() * _ID.itemsize:
        raise CheckpointError(
            f"{path}: has {num_bytes} bytes, its index says {lengths.sum()} tokens of {_ID.itemsize} bytes; "
            f"{remedy_for(folder)}"
        )
    if not (folder / HELD_OUT_FOLDER).is_dir():
        raise CheckpointError(f"{folder / HELD_OUT_FOLDER}: is missing; {remedy_for(folder)}")
    return Corpus(np.memmap(path, _ID, mode="r"), lengths, weights, index)


def document_ids(tokenizer: Tokenizer, document: str) -> list[int]:
    """BOS (where the vocabulary puts one), the words, EOS."""
    assert tokenizer.eos_id is not None  # read_vocabulary saw to it
    start = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    return [*start, *tokenizer.encode(document, add_special=False), tokenizer.eos_id]


class Batches:
    """Batches by step. One epoch's order is held at a time; any step can be asked for, in any order.

    Sequences are shuffled after they are cut, so that a long document does not fill a whole batch with itself.
    """

    def __init__(self, corpus: Corpus, seed: int, num_sequences: int, seq_len: int) -> None:
        self._corpus = corpus
        self._seed = seed
        self._num_sequences = num_sequences
        self._seq_len = seq_len
        self._starts = np.concatenate([[0], np.cumsum(corpus.lengths)])
        self._step_tokens = num_sequences * seq_len + 1
        if corpus.tokens_per_epoch < self._step_tokens:
            raise UsageError(
                f"an epoch has {corpus.tokens_per_epoch:.0f} tokens, one step reads {self._step_tokens}; "
                "give more text, or less --batch-tokens or --seq-len"
            )
        self._first_step = 0
        self._epoch = self._make_epoch(0)

    def step(self, step_idx: int) -> Ids:
        """[B, seq_len + 1]: inputs are all but the last column, targets all but the first."""
        if step_idx < self._first_step:
            self._first_step = 0
            self._epoch = self._make_epoch(0)
        while step_idx >= self._first_step + self._steps_of(self._epoch):
            self._first_step += self._steps_of(self._epoch)
            self._epoch = self._make_epoch(self._epoch.idx + 1)
        first = (step_idx - self._first_step) * self._num_sequences
        rows = self._epoch.sequences[first : first + self._num_sequences]
        return np.stack([self._read(int(row) * self._seq_len, self._seq_len + 1) for row in rows])

    def _steps_of(self, epoch: _Epoch) -> int:
        return len(epoch.sequences) // self._num_sequences

    def _make_epoch(self, epoch_idx: int) -> _Epoch:
        random = np.random.default_rng([self._seed, epoch_idx])
        documents = self._draw(random)
        while self._corpus.lengths[documents].sum() < self._step_tokens:  # fewer were drawn than are expected
            documents = np.concatenate([documents, self._draw(random)])
        random.shuffle(documents)
        ends = np.cumsum(self._corpus.lengths[documents])
        return _Epoch(epoch_idx, documents, ends, random.permutation((int(ends[-1]) - 1) // self._seq_len))

    def _draw(self, random: np.random.Generator) -> Counts:
        """Every document as often as its weight says; a fraction is a chance."""
        weights = self._corpus.weights
        whole = np.floor(weights)
        repeats = whole + (random.random(len(weights)) < weights - whole)
        return np.repeat(np.arange(len(weights)), repeats.astype(np.int64))

    def _read(self, first: int, length: int) -> Ids:
        """Tokens [first, first + length) of the epoch."""
        pieces = []
        idx = int(np.searchsorted(self._epoch.ends, first, side="right"))
        while length > 0:
            end = int(self._epoch.ends[idx])
            taken = min(length, end - first)
            source = int(self._starts[self._epoch.documents[idx] + 1]) - (end - first)
            pieces.append(self._corpus.tokens[source : source + taken])
            first, length, idx = first + taken, length - taken, idx + 1
        return np.concatenate(pieces)


@dataclass(frozen=True, slots=True)
class _Epoch:
    """documents: in their order; ends: the position after each; sequences: the order in which they are read."""

    idx: int
    documents: Counts
    ends: Counts
    sequences: Counts
