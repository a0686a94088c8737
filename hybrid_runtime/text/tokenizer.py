"""A tokenizer: text to ids and back, the same face over sentencepiece and over tokenizers.

Two backends know vocabularies (`sentencepiece_vocabulary`, `tokenizers_vocabulary`); `VocabularyTokenizer` adds what
both need: the ids around a prompt, the ids that end a turn, decoding byte by byte so that a stream and a whole decode
agree, and saving. It knows no model and no chat template.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hybrid_runtime.errors import TokenizerError
from hybrid_runtime.text.saved_form import write_saved_tokenizer


class TextStream:
    """Turns ids into text one at a time, holding back bytes until they complete a character."""

    def __init__(self, bytes_of: Callable[[int], bytes], *, strip_first_space: bool) -> None:
        self._bytes_of = bytes_of
        self._strip_next_space = strip_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is unfinished."""
        data = self._bytes_of(token_id)
        if self._strip_next_space and data:
            data = data.removeprefix(b" ")
            self._strip_next_space = False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left when the ids end: a replacement character for bytes that never became one, else nothing."""
        return self._decoder.decode(b"", final=True)


class Tokenizer(Protocol):
    """What the engine, the command line and the server need to know of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids it knows, added tokens included (one more than the highest id)."""

    @property
    def bos_id(self) -> int | None:
        """The id that begins a sequence, if the vocabulary has one."""

    @property
    def eos_id(self) -> int | None:
        """The id that the tokenizer itself calls its end; `end_ids` has every one."""

    @property
    def add_bos(self) -> bool:
        """Whether `encode(add_special=True)` puts BOS first."""

    @property
    def end_ids(self) -> frozenset[int]:
        """Every id that ends a turn."""

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of `text`; control tokens written in it count as such only with `parse_special`."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens omitted."""

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary, or None."""

    def token_of(self, token_id: int) -> str | None:
        """The name of a token in the vocabulary, or None where the id has none."""

    def stream(self, *, after: Sequence[int] = ()) -> TextStream:
        """Decode one id at a time, after the ids `after` (a prompt), whose text is not repeated."""

    def save(self, folder: Path) -> None:
        """Write everything that `load_tokenizer(folder)` needs to give this tokenizer back."""


class Vocabulary(Protocol):
    """A backend: it owns the pieces and how text is cut into them."""

    @property
    def kind(self) -> str:
        """`sentencepiece` or `tokenizers`, as the saved form names it."""

    @property
    def size(self) -> int:
        """One more than the highest id."""

    @property
    def strip_first_space(self) -> bool:
        """Whether encoding puts a space before the text, which decoding must take away."""

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids that the vocabulary's own file puts before a text."""

    @property
    def suffix_ids(self) -> tuple[int, ...]:
        """Ids that the vocabulary's own file puts after a text."""

    def encode_text(self, text: str, *, parse_special: bool) -> list[int]:
        """Ids of a checked text, nothing added."""

    def bytes_of(self, token_id: int) -> bytes:
        """UTF-8 bytes that a token stands for; empty for a special token and for an id without one."""

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name."""

    def token_of(self, token_id: int) -> str | None:
        """The name of a token."""

    def is_added(self, token_id: int) -> bool:
        """Whether the token is a control or an added one, which plain text pieces are not."""

    def saved_files(self) -> Mapping[str, bytes]:
        """The vocabulary's files, by name."""

    def saved_settings(self) -> Mapping[str, object]:
        """What the files do not say, as JSON."""


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """The ids around a text: what goes before and after it, and what ends a turn."""

    bos_id: int | None
    eos_id: int | None
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    end_ids: frozenset[int]


class VocabularyTokenizer:
    """A vocabulary and its special ids: the one implementation of `Tokenizer`."""

    def __init__(self, vocabulary: Vocabulary, special: SpecialIds) -> None:
        self.vocabulary = vocabulary
        self.special = special

    @property
    def vocab_size(self) -> int:
        """Number of ids it knows, added tokens included (one more than the highest id)."""
        return self.vocabulary.size

    @property
    def bos_id(self) -> int | None:
        """The id that begins a sequence, if the vocabulary has one."""
        return self.special.bos_id

    @property
    def eos_id(self) -> int | None:
        """The id that the tokenizer itself calls its end; `end_ids` has every one."""
        return self.special.eos_id

    @property
    def add_bos(self) -> bool:
        """Whether `encode(add_special=True)` puts BOS first."""
        return self.special.bos_id is not None and self.special.prefix_ids[:1] == (self.special.bos_id,)

    @property
    def end_ids(self) -> frozenset[int]:
        """Every id that ends a turn."""
        return self.special.end_ids

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of `text`; control tokens written in it count as such only with `parse_special`."""
        ids = self.vocabulary.encode_text(checked_text(text), parse_special=parse_special)
        if not add_special:
            return ids
        return [*self.special.prefix_ids, *ids, *self.special.suffix_ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens omitted; invalid bytes become U+FFFD, one for each broken sequence."""
        data = b"".join(self._bytes_of(token_id) for token_id in ids)
        if self.vocabulary.strip_first_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary, or None."""
        return self.vocabulary.id_of(token)

    def token_of(self, token_id: int) -> str | None:
        """The name of a token in the vocabulary, or None where the id has none."""
        return self.vocabulary.token_of(token_id) if 0 <= token_id < self.vocab_size else None

    def stream(self, *, after: Sequence[int] = ()) -> TextStream:
        """Decode one id at a time; with `after`, a first word keeps the space that parts it from the prompt."""
        stream = TextStream(self._bytes_of, strip_first_space=self.vocabulary.strip_first_space)
        for token_id in after:
            stream.push(token_id)
        return stream

    def save(self, folder: Path) -> None:
        """Write everything that `load_tokenizer(folder)` needs to give this tokenizer back."""
        settings = {
            "backend": self.vocabulary.kind,
            "bos_id": self.special.bos_id,
            "eos_id": self.special.eos_id,
            "prefix_ids": list(self.special.prefix_ids),
            "suffix_ids": list(self.special.suffix_ids),
            "end_ids": sorted(self.special.end_ids),
            **self.vocabulary.saved_settings(),
        }
        write_saved_tokenizer(folder, self.vocabulary.saved_files(), settings)

    def _bytes_of(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocabulary.size:
            raise TokenizerError(
                f"token id {token_id} is outside the vocabulary of {self.vocabulary.size} tokens; "
                "decode with the tokenizer that made the ids"
            )
        return self.vocabulary.bytes_of(int(token_id))


def checked_text(text: str) -> str:
    """Refuse text that no encoding can write: Python allows lone surrogates, UTF-8 does not."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text holds the lone surrogate U+{ord(text[error.start]):04X} at index {error.start}, which is not "
            "valid Unicode; replace it, for example with text.encode('utf-8', 'replace').decode()"
        ) from None
    return text
