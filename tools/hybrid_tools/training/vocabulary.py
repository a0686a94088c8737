"""The tokenizer of a training run: trained on the run's own text with sentencepiece, or an existing one.

A trained one is a Llama tokenizer in all but its pieces: byte-level BPE fallback, no normalisation, digits split,
`<unk>` 0, `<s>` 1, `</s>` 2. Training sees what the model will see, weights included, and nothing that is held out.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from hybrid_runtime.errors import TokenizerError, UsageError
from hybrid_runtime.text.documents import read_documents
from hybrid_runtime.text.load import load_tokenizer, load_tokenizer_file
from hybrid_runtime.text.sentencepiece_vocabulary import TOKENIZER_MODEL
from hybrid_runtime.text.tokenizer import Tokenizer
from hybrid_runtime.text.tokenizers_vocabulary import TOKENIZER_JSON
from hybrid_tools.training.documents import TextFile, is_held_out

SMALLEST_VOCABULARY = 3 + 256 + 1  # special tokens, bytes, and one piece of text
MOST_LINES = 2_000_000  # that sentencepiece holds in memory
LONGEST_LINE_BYTES = 16384  # that sentencepiece does not leave out
TOKENIZER_FILES = (
    TOKENIZER_MODEL,
    TOKENIZER_JSON,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
    "clean_up_tokenization_spaces": False,
}


def train_vocabulary(files: Sequence[TextFile], held_out: float, vocab_size: int, folder: Path) -> None:
    """Write tokenizer.model and tokenizer_config.json. Raise UsageError when the text is too small for vocab_size."""
    import sentencepiece  # noqa: PLC0415  # only where one is trained

    if vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(f"--vocab-size {vocab_size}: expected at least {SMALLEST_VOCABULARY} (bytes are pieces too)")
    model = io.BytesIO()
    lines = _Lines(files, held_out)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            character_coverage=0.9999,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            input_sentence_size=MOST_LINES,
            shuffle_input_sentence=False,
            max_sentence_length=LONGEST_LINE_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise lines.error or _unsuitable(vocab_size, error) from error
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKENIZER_MODEL).write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps(_CONFIG, indent=1) + "\n")


def copy_vocabulary(source: Path, folder: Path) -> None:
    """Copy a published tokenizer's files, from its folder or as one file, as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        load_tokenizer(source)  # raises for what nobody could read later
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        return
    if not source.is_file():
        raise UsageError(f"--tokenizer {source}: no such file or folder")
    load_tokenizer_file(source)
    is_json = source.read_bytes().lstrip()[:1] == b"{"
    shutil.copyfile(source, folder / (TOKENIZER_JSON if is_json else TOKENIZER_MODEL))
    if not is_json:
        (folder / "tokenizer_config.json").write_text(json.dumps(_CONFIG, indent=1) + "\n")


def read_vocabulary(folder: Path) -> Tokenizer:
    """The run's tokenizer; raise TokenizerError where it has no token that ends a document."""
    tokenizer = load_tokenizer(folder)
    if tokenizer.eos_id is None:
        raise TokenizerError(f"{folder}: the tokenizer names no eos_token, and documents must end with one")
    return tokenizer


class _Lines:
    """What sentencepiece learns from, and why reading it failed: sentencepiece wraps what an iterator raises."""

    def __init__(self, files: Sequence[TextFile], held_out: float) -> None:
        self.error: UsageError | None = None
        self._files = files
        self._held_out = held_out
        self._stride = 1 + sum(1 for _ in self._weighted()) // MOST_LINES  # every so many, from all files alike

    def __iter__(self) -> Iterator[str]:
        try:
            for idx, line in enumerate(self._weighted()):
                if idx % self._stride == 0:
                    yield line
        except UsageError as error:
            self.error = error
            raise

    def _weighted(self) -> Iterator[str]:
        """Every line as often as its file's weight says: BPE counts pairs."""
        for file in self._files:
            if file.weight >= 1:
                for line in self._of(file):
                    for _ in range(round(file.weight)):
                        yield line
            else:
                every = round(1 / file.weight)
                yield from (line for idx, line in enumerate(self._of(file)) if idx % every == 0)

    def _of(self, file: TextFile) -> Iterator[str]:
        for document in read_documents(file.path):
            if not is_held_out(document, self._held_out):
                for line in document.split("\n"):
                    yield from _cut(line)


def _cut(line: str) -> Iterator[str]:
    """The line, in parts where sentencepiece would leave it out; nothing of an empty one."""
    longest = max(1, len(line)) if len(line.encode()) <= LONGEST_LINE_BYTES else LONGEST_LINE_BYTES // 4
    for start in range(0, len(line), longest):
        yield line[start : start + longest]


def _unsuitable(vocab_size: int, error: Exception) -> UsageError:
    supported = re.search(r"(?:<=|set it to a value <=) *(\d+)", str(error))
    if supported:
        return UsageError(
            f"--vocab-size {vocab_size}: the text supports at most {supported[1]} pieces; "
            f"use --vocab-size {supported[1]} or more text"
        )
    required = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
    if required:
        return UsageError(
            f"--vocab-size {vocab_size}: the text's characters and all bytes are {required[1]} pieces already; use more"
        )
    return UsageError(f"--vocab-size {vocab_size}: no vocabulary could be trained on the text: {error}")
