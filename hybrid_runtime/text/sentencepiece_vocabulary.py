"""A vocabulary that sentencepiece holds: a tokenizer.model, or a model written from a GGUF file's token list.

sentencepiece cuts plain text only. Control tokens in a text, tokens added beside the model, and the space that Llama
vocabularies put before a word at the start, are joined to it here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum

import sentencepiece

from hybrid_runtime.errors import TokenizerError
from hybrid_runtime.text.added_tokens import AddedToken, AddedTokenSplitter, check_added
from hybrid_runtime.text.sentencepiece_proto import without_dummy_prefix

TOKENIZER_MODEL = "tokenizer.model"
_SPACE_MARK = "▁"


class SpacePrefix(StrEnum):
    """Where a model that wants a space before a text gets one."""

    NONE = "none"
    FIRST = "first"  # only where the whole text begins: today's Hugging Face tokenizers, official Mistral templates
    EVERY = "every"  # also after each added token: llama.cpp, and Hugging Face with legacy: true


class SentencePieceVocabulary:
    """Pieces and cutting by sentencepiece, added tokens in front of it."""

    kind = "sentencepiece"
    prefix_ids: tuple[int, ...] = ()  # a tokenizer.model says nothing of what surrounds a text
    suffix_ids: tuple[int, ...] = ()

    def __init__(self, model: bytes, added: Iterable[AddedToken], space_prefix: SpacePrefix, *, file: str) -> None:
        self._model = model
        self._pieces = load_model(without_dummy_prefix(model), file=file)
        self._pieces_after_space = load_model(model, file=file)
        self._has_dummy_prefix = self._pieces_after_space.encode("a", out_type=str)[:1] != ["a"]
        self._space_prefix = space_prefix if self._has_dummy_prefix else SpacePrefix.NONE
        given = check_added(added, file=file, field="added tokens")
        self._check_given(given, file=file)
        self._given = given
        everything = check_added([*given, *_control_tokens(self._pieces)], file=file, field="added tokens")
        self._added = {token.token_id: token for token in everything}
        self._size = max(self._pieces.get_piece_size(), *(token_id + 1 for token_id in self._added), 0)
        self._id_of_added = {token.text: token.token_id for token in everything}
        self._special = frozenset(token.token_id for token in everything if token.special)
        self._bytes = frozenset(idx for idx, is_byte in enumerate(_flags(self._pieces, "is_byte")) if is_byte)
        self._split_all = AddedTokenSplitter(everything)
        self._split_plain = AddedTokenSplitter([token for token in everything if not token.special])

    @property
    def size(self) -> int:
        """One more than the highest id."""
        return self._size

    @property
    def strip_first_space(self) -> bool:
        """Whether decoding takes away a first space."""
        return self._space_prefix is not SpacePrefix.NONE

    @property
    def model_bos_id(self) -> int | None:
        """The BOS that the model itself names."""
        bos_id = self._pieces.bos_id()
        return bos_id if bos_id >= 0 else None

    @property
    def model_eos_id(self) -> int | None:
        """The EOS that the model itself names."""
        eos_id = self._pieces.eos_id()
        return eos_id if eos_id >= 0 else None

    def encode_text(self, text: str, *, parse_special: bool) -> list[int]:
        """Ids of `text`, nothing added but the model's own space."""
        ids: list[int] = []
        splitter = self._split_all if parse_special else self._split_plain
        for idx, part in enumerate(splitter.split(text)):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(self._processor(is_first=idx == 0).encode(part))
        return ids

    def bytes_of(self, token_id: int) -> bytes:
        """UTF-8 bytes that a token stands for."""
        if token_id in self._special:
            return b""
        if token_id in self._bytes:
            return bytes([int(self._pieces.id_to_piece(token_id)[3:5], 16)])
        return (self.token_of(token_id) or "").replace(_SPACE_MARK, " ").encode()

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name."""
        if token in self._id_of_added:
            return self._id_of_added[token]
        token_id = self._pieces.piece_to_id(token)  # the unknown token's id for every name it does not know
        return token_id if self._pieces.id_to_piece(token_id) == token else None

    def token_of(self, token_id: int) -> str | None:
        """The name of a token."""
        if token_id in self._added:
            return self._added[token_id].text
        return self._pieces.id_to_piece(token_id) if token_id < self._pieces.get_piece_size() else None

    def is_added(self, token_id: int) -> bool:
        """Whether the token is a control or an added one."""
        return token_id in self._added

    def saved_files(self) -> Mapping[str, bytes]:
        """The model as it was given."""
        return {TOKENIZER_MODEL: self._model}

    def saved_settings(self) -> Mapping[str, object]:
        """The added tokens and the space, of which the model knows nothing."""
        return {"space_prefix": str(self._space_prefix), "added_tokens": [token.as_json() for token in self._given]}

    def _processor(self, *, is_first: bool) -> sentencepiece.SentencePieceProcessor:
        wants_space = self._space_prefix is SpacePrefix.EVERY or (self._space_prefix is SpacePrefix.FIRST and is_first)
        return self._pieces_after_space if wants_space else self._pieces

    def _check_given(self, given: Iterable[AddedToken], *, file: str) -> None:
        for token in given:
            holder = (
                self._pieces.id_to_piece(token.token_id) if token.token_id < self._pieces.get_piece_size() else None
            )
            if holder is not None and holder != token.text:
                raise TokenizerError(
                    f"{file}: added token {token.text!r} has id {token.token_id}, which is {holder!r} in the "
                    "vocabulary; every token needs an id of its own"
                )


def load_model(model: bytes, *, file: str) -> sentencepiece.SentencePieceProcessor:
    """A processor over a serialised model; what sentencepiece refuses is refused with the file's name."""
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError) as error:
        raise TokenizerError(
            f"{file}: not a model that sentencepiece can read: {' '.join(str(error).split())}; fetch the file again"
        ) from error
    if processor.get_piece_size() == 0:
        raise TokenizerError(f"{file}: pieces: found none; expected a sentencepiece model; fetch the file again")
    return processor


def _control_tokens(pieces: sentencepiece.SentencePieceProcessor) -> list[AddedToken]:
    """The model's control and unknown pieces: special, because plain text must never give one."""
    control = zip(_flags(pieces, "is_control"), _flags(pieces, "is_unknown"), strict=True)
    return [
        AddedToken(pieces.id_to_piece(token_id), token_id, special=True)
        for token_id, flags in enumerate(control)
        if any(flags)
    ]


def _flags(pieces: sentencepiece.SentencePieceProcessor, name: str) -> list[bool]:
    flags: list[bool] = getattr(pieces, name)(list(range(pieces.get_piece_size())))
    return flags
