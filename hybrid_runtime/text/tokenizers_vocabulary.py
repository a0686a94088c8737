"""A vocabulary that the tokenizers library holds: any tokenizer.json, and byte-level BPE built from its parts."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from hybrid_runtime.errors import TokenizerError
from hybrid_runtime.text.added_tokens import AddedToken
from hybrid_runtime.text.bpe_splits import BpeSplit
from hybrid_runtime.text.json_files import parse_json_object
from hybrid_runtime.text.piece_text import PieceDecoder, read_piece_decoder

TOKENIZER_JSON = "tokenizer.json"


class TokenizersVocabulary:
    """Pieces and cutting by a `tokenizers.Tokenizer`; decoding by `PieceDecoder`."""

    kind = "tokenizers"

    def __init__(self, tokenizer: tokenizers.Tokenizer, decoder: PieceDecoder, *, file: str) -> None:
        # Left on, a file's own settings would cut prompts short or fill them up without a word.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._decoder = decoder
        self._encoding = threading.Lock()  # parse_special is a setting of the library's tokenizer, not an argument
        self._added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token_id for token_id, token in self._added.items() if token.special)
        self._size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self._prefix_ids, self._suffix_ids = _template_ids(tokenizer, file=file)

    @property
    def size(self) -> int:
        """One more than the highest id."""
        return self._size

    @property
    def strip_first_space(self) -> bool:
        """Whether decoding takes away a first space."""
        return self._decoder.strip_first_space

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids that the file's template puts before a text."""
        return self._prefix_ids

    @property
    def suffix_ids(self) -> tuple[int, ...]:
        """Ids that the file's template puts after a text."""
        return self._suffix_ids

    def encode_text(self, text: str, *, parse_special: bool) -> list[int]:
        """Ids of `text`, nothing added."""
        with self._encoding:
            self._tokenizer.encode_special_tokens = not parse_special
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def bytes_of(self, token_id: int) -> bytes:
        """UTF-8 bytes that a token stands for."""
        piece = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        return b"" if piece is None else self._decoder.bytes_of(piece)

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name."""
        return self._tokenizer.token_to_id(token)

    def token_of(self, token_id: int) -> str | None:
        """The name of a token."""
        return self._tokenizer.id_to_token(token_id)

    def is_added(self, token_id: int) -> bool:
        """Whether the token is a special or an added one."""
        return token_id in self._added

    def saved_files(self) -> Mapping[str, bytes]:
        """The library's own file."""
        return {TOKENIZER_JSON: self._tokenizer.to_str().encode()}

    def saved_settings(self) -> Mapping[str, object]:
        """Nothing: the file says it all."""
        return {}


def read_tokenizer_json(data: bytes, *, file: str, added: Sequence[AddedToken] = ()) -> TokenizersVocabulary:
    """A tokenizer.json, checked; `added` are tokens that other files of the checkpoint define and this one may lack."""
    content = parse_json_object(data, file=file)
    _check_vocabulary_ids(content, file=file)
    tokenizer = _parse(data, file=file)
    _check_added_ids(content, tokenizer, file=file)
    add_missing(tokenizer, added, file=file)
    return TokenizersVocabulary(tokenizer, read_piece_decoder(content.get("decoder"), file=file), file=file)


def byte_level_bpe(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    split: BpeSplit,
    added: Sequence[AddedToken],
    *,
    file: str,
) -> TokenizersVocabulary:
    """Byte-level BPE from its parts, as GGUF files and vocab.json with merges.txt hold them."""
    for idx, (left, right) in enumerate(merges):
        for piece in (left, right, left + right):
            if piece not in vocabulary:
                raise TokenizerError(f"{file}: merges[{idx}] {left!r} + {right!r}: {piece!r} is not in the vocabulary")
    model = models.BPE(vocab=dict(vocabulary), merges=list(merges), ignore_merges=split.ignore_merges)
    tokenizer = tokenizers.Tokenizer(model)
    cuts = [pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated") for pattern in split.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    add_missing(tokenizer, added, file=file)
    return TokenizersVocabulary(tokenizer, PieceDecoder(byte_level=True), file=file)


def add_missing(tokenizer: tokenizers.Tokenizer, added: Sequence[AddedToken], *, file: str) -> None:
    """Teach the library the added tokens it does not know as such, each under the id that its file gives it."""
    known = tokenizer.get_added_tokens_decoder()
    for token in sorted(added, key=lambda token: token.token_id):
        if token.token_id in known and known[token.token_id].content == token.text:
            continue
        holder = tokenizer.id_to_token(token.token_id)
        if holder is not None and holder != token.text:
            raise TokenizerError(
                f"{file}: added token {token.text!r} has id {token.token_id}, which is {holder!r} in the vocabulary; "
                "every token needs an id of its own"
            )
        tokenizer.add_tokens([_library_token(token)])
        if tokenizer.token_to_id(token.text) != token.token_id:
            raise TokenizerError(
                f"{file}: added token {token.text!r} has id {token.token_id}, but the next free id is "
                f"{tokenizer.token_to_id(token.text)}; the vocabulary is not the one the token was added to"
            )


def _library_token(token: AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        token.text,
        special=token.special,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
        normalized=False,
    )


def _parse(data: bytes, *, file: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(data.decode())
    except Exception as error:
        if type(error) is not Exception:  # tokenizers raises the bare class for a file it refuses, and only then
            raise
        raise TokenizerError(f"{file}: not a tokenizer that tokenizers can read: {error}; fetch it again") from error


def _check_vocabulary_ids(content: Mapping[str, object], *, file: str) -> None:
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise TokenizerError(f"{file}: model.vocab: expected an object of token: id, as BPE models have; found none")
    holders: dict[int, str] = {}
    for text, token_id in vocabulary.items():
        if type(token_id) is not int or token_id < 0:
            raise TokenizerError(f"{file}: model.vocab[{text!r}]: found {json.dumps(token_id)}; expected an id")
        if token_id in holders:
            raise TokenizerError(f"{file}: model.vocab: {holders[token_id]!r} and {text!r} share the id {token_id}")
        holders[token_id] = text


def _check_added_ids(content: Mapping[str, object], tokenizer: tokenizers.Tokenizer, *, file: str) -> None:
    """The library numbers colliding added tokens anew without a word, so compare with what the file says."""
    added = content.get("added_tokens", [])
    assert isinstance(added, list)  # the library has read the same bytes and refuses anything else
    for idx, token in enumerate(added):
        text, token_id = token["content"], token["id"]
        if tokenizer.token_to_id(text) != token_id or tokenizer.id_to_token(token_id) != text:
            raise TokenizerError(
                f"{file}: added_tokens[{idx}] {text!r} has id {token_id}, which collides with "
                f"{tokenizer.id_to_token(token_id)!r} (and {text!r} gets id {tokenizer.token_to_id(text)}); "
                "every added token needs an id of its own"
            )


def _template_ids(tokenizer: tokenizers.Tokenizer, *, file: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the file's template puts before and after a text, seen by what it puts around nothing and around a word."""
    around = tokenizer.encode("", add_special_tokens=True).ids
    if not around:
        return (), ()
    inner = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    for count in range(len(around) + 1):
        if whole == [*around[:count], *inner, *around[count:]]:
            return tuple(around[:count]), tuple(around[count:])
    raise TokenizerError(f"{file}: post_processor: makes {whole} of {inner}; expected the same ids around any text")
