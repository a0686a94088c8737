"""The vocabulary in a GGUF file's metadata: SPM token lists become a sentencepiece model, BPE ones byte-level BPE.

It checks the lists against each other before anything is built, and follows llama.cpp where the file is silent: a BOS
before SPM prompts, a space before the text and after each added token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hybrid_runtime.errors import TokenizerError
from hybrid_runtime.text.added_tokens import AddedToken
from hybrid_runtime.text.bpe_splits import bpe_split
from hybrid_runtime.text.folder_settings import NamedId
from hybrid_runtime.text.sentencepiece_proto import Piece, PieceType, bpe_model_proto
from hybrid_runtime.text.sentencepiece_vocabulary import SentencePieceVocabulary, SpacePrefix
from hybrid_runtime.text.special_ids import end_ids
from hybrid_runtime.text.tokenizer import SpecialIds, Vocabulary, VocabularyTokenizer
from hybrid_runtime.text.tokenizers_vocabulary import byte_level_bpe

_KEY = "tokenizer.ggml."
_NO_TOKEN = 0xFFFFFFFF  # -1 as the format's unsigned integer
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


@dataclass(frozen=True, slots=True)
class GgufTokens:
    """The token lists of a GGUF file, of one length, with ids that lie inside."""

    file: str
    texts: tuple[str, ...]
    types: tuple[PieceType, ...]
    special_ids: Mapping[str, int]
    flags: Mapping[str, bool]

    def added(self) -> list[AddedToken]:
        """Tokens that are cut out of a text by name: user-defined ones always, control ones on request."""
        special = {PieceType.CONTROL, PieceType.UNKNOWN}
        return [
            AddedToken(text, token_id, special=kind in special)
            for token_id, (text, kind) in enumerate(zip(self.texts, self.types, strict=True))
            if kind in special or kind is PieceType.USER_DEFINED
        ]

    def surround(self, vocabulary: Vocabulary, *, add_bos: bool) -> VocabularyTokenizer:
        """The tokenizer over `vocabulary`, with this file's special ids; `add_bos` holds where the file is silent."""
        bos_id, eos_id = self.special_ids.get("bos_token_id"), self.special_ids.get("eos_token_id")
        named = [
            NamedId(self.special_ids[key], f"{self.file}: {_KEY}{key}") for key in _END_KEYS if key in self.special_ids
        ]
        starts = bos_id is not None and self.flags.get("add_bos_token", add_bos)
        stops = eos_id is not None and self.flags.get("add_eos_token", False)
        special = SpecialIds(
            bos_id=bos_id,
            eos_id=eos_id,
            prefix_ids=(bos_id,) if starts and bos_id is not None else (),
            suffix_ids=(eos_id,) if stops and eos_id is not None else (),
            end_ids=end_ids(vocabulary, eos_id, named),
        )
        return VocabularyTokenizer(vocabulary, special)


def gguf_tokenizer(metadata: Mapping[str, object], *, file: str) -> VocabularyTokenizer:
    """The tokenizer that a GGUF file's metadata describes."""
    model = metadata.get(f"{_KEY}model")
    if model == "llama":
        return _sentencepiece_tokenizer(metadata, file=file)
    if model == "gpt2":
        return _bpe_tokenizer(metadata, file=file)
    raise TokenizerError(f"{file}: {_KEY}model: found {model!r}; known are 'llama' (SPM) and 'gpt2' (byte-level BPE)")


def _sentencepiece_tokenizer(metadata: Mapping[str, object], *, file: str) -> VocabularyTokenizer:
    tokens = _read_tokens(
        metadata, file=file, default_ids={"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    )
    scores = _scores(metadata, count=len(tokens.texts), file=file)
    pieces = [Piece(text, score, kind) for text, score, kind in zip(tokens.texts, scores, tokens.types, strict=True)]
    has_bytes = _checked_bytes(tokens)
    adds_space = tokens.flags.get("add_space_prefix", True)
    vocabulary = SentencePieceVocabulary(
        bpe_model_proto(pieces, byte_fallback=has_bytes, add_dummy_prefix=adds_space),
        tokens.added(),
        SpacePrefix.EVERY if adds_space else SpacePrefix.NONE,
        file=file,
    )
    return tokens.surround(vocabulary, add_bos=True)


def _bpe_tokenizer(metadata: Mapping[str, object], *, file: str) -> VocabularyTokenizer:
    tokens = _read_tokens(metadata, file=file, default_ids={})
    pre = metadata.get(f"{_KEY}pre", "default")
    split = bpe_split(str(pre), file=file)
    merges = [_merge(text, idx, file=file) for idx, text in enumerate(_texts(metadata, "merges", file=file))]
    vocabulary = byte_level_bpe(
        {text: token_id for token_id, text in enumerate(tokens.texts)}, merges, split, tokens.added(), file=file
    )
    return tokens.surround(vocabulary, add_bos=split.add_bos)


def _read_tokens(metadata: Mapping[str, object], *, file: str, default_ids: Mapping[str, int]) -> GgufTokens:
    texts = _texts(metadata, "tokens", file=file)
    _check_texts(texts, file=file)
    special_ids = _special_ids(metadata, count=len(texts), file=file, default_ids=default_ids)
    flags: dict[str, bool] = {}
    for name in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        value = metadata.get(_KEY + name)
        if isinstance(value, bool):
            flags[name] = value
        elif value is not None:
            raise TokenizerError(f"{file}: {_KEY}{name}: found {value!r}; expected true or false")
    types = _types(metadata, texts, special_ids, file=file)
    return GgufTokens(file, texts, types, special_ids, flags)


def _check_texts(texts: tuple[str, ...], *, file: str) -> None:
    if not texts:
        raise TokenizerError(f"{file}: {_KEY}tokens: found an empty list; expected the vocabulary")
    seen: dict[str, int] = {}
    for token_id, text in enumerate(texts):
        if not text:
            raise TokenizerError(f"{file}: {_KEY}tokens[{token_id}]: found an empty text; expected a token")
        first = seen.setdefault(text, token_id)
        if first != token_id:
            raise TokenizerError(
                f"{file}: {_KEY}tokens: {text!r} stands at {first} and at {token_id}; every token must be there once"
            )


def _special_ids(
    metadata: Mapping[str, object], *, count: int, file: str, default_ids: Mapping[str, int]
) -> Mapping[str, int]:
    ids = {name: token_id for name, token_id in default_ids.items() if token_id < count}
    for name in ("bos_token_id", "unknown_token_id", *_END_KEYS):
        value = metadata.get(_KEY + name)
        if value is None:
            continue
        token_id = _integer(value, f"{_KEY}{name}", file=file)
        if token_id in {_NO_TOKEN, -1}:
            ids.pop(name, None)
        elif 0 <= token_id < count:
            ids[name] = token_id
        else:
            raise TokenizerError(
                f"{file}: {_KEY}{name}: found {token_id}, which is outside the vocabulary of {count} tokens; "
                "the file is inconsistent, convert or fetch it again"
            )
    return ids


def _types(
    metadata: Mapping[str, object], texts: tuple[str, ...], special_ids: Mapping[str, int], *, file: str
) -> tuple[PieceType, ...]:
    """What each token is for; files from before token_type tell it by the names and the special ids."""
    values = metadata.get(f"{_KEY}token_type")
    if values is None:
        kinds = [PieceType.BYTE if _BYTE_TOKEN.fullmatch(text) else PieceType.NORMAL for text in texts]
        for name, token_id in special_ids.items():
            kinds[token_id] = PieceType.UNKNOWN if name == "unknown_token_id" else PieceType.CONTROL
        return _one_unknown(kinds, special_ids)
    numbers = [_integer(value, f"{_KEY}token_type", file=file) for value in _items(values, "token_type", file=file)]
    _check_count("token_type", len(numbers), len(texts), file=file)
    known = {int(kind) for kind in PieceType}
    for token_id, number in enumerate(numbers):
        if number not in known:
            raise TokenizerError(f"{file}: {_KEY}token_type[{token_id}]: found {number}; known are {sorted(known)}")
    return _one_unknown([PieceType(number) for number in numbers], special_ids)


def _one_unknown(kinds: list[PieceType], special_ids: Mapping[str, int]) -> tuple[PieceType, ...]:
    """Keep one unknown token, as sentencepiece wants: others become control tokens, which text never gives either."""
    unknown = [token_id for token_id, kind in enumerate(kinds) if kind is PieceType.UNKNOWN]
    for token_id in unknown[1:]:
        kinds[token_id] = PieceType.CONTROL
    if not unknown and "unknown_token_id" in special_ids:
        kinds[special_ids["unknown_token_id"]] = PieceType.UNKNOWN
    return tuple(kinds)


def _checked_bytes(tokens: GgufTokens) -> bool:
    """Whether the vocabulary has byte tokens; some but not all of them would make text unreadable."""
    count = sum(kind is PieceType.BYTE for kind in tokens.types)
    if count not in {0, 0x100}:
        raise TokenizerError(f"{tokens.file}: {_KEY}token_type: found {count} byte tokens; expected all 256 or none")
    return count > 0


def _scores(metadata: Mapping[str, object], *, count: int, file: str) -> list[float]:
    values = _items(metadata.get(f"{_KEY}scores"), "scores", file=file)
    _check_count("scores", len(values), count, file=file)
    for token_id, value in enumerate(values):
        if not isinstance(value, float | int) or not math.isfinite(value):
            raise TokenizerError(f"{file}: {_KEY}scores[{token_id}]: found {value!r}; expected a finite number")
    return [float(value) for value in values if isinstance(value, float | int)]


def _merge(text: str, idx: int, *, file: str) -> tuple[str, str]:
    left, space, right = text.partition(" ")
    if not left or not space or not right:
        raise TokenizerError(f"{file}: {_KEY}merges[{idx}]: found {text!r}; expected two pieces with a space between")
    return left, right


def _texts(metadata: Mapping[str, object], name: str, *, file: str) -> tuple[str, ...]:
    texts: list[str] = []
    for idx, value in enumerate(_items(metadata.get(_KEY + name), name, file=file)):
        if not isinstance(value, str):
            raise TokenizerError(f"{file}: {_KEY}{name}[{idx}]: found {type(value).__name__}; expected a string")
        texts.append(value)
    return tuple(texts)


def _items(value: object, name: str, *, file: str) -> list[object]:
    """A list's items as Python values, whether a parser gave a list or an array."""
    if value is None:
        raise TokenizerError(f"{file}: {_KEY}{name} is missing; without it the file has no usable vocabulary")
    to_list = getattr(value, "tolist", None)
    plain = to_list() if callable(to_list) else value
    if isinstance(plain, str | bytes | Mapping) or not isinstance(plain, Iterable):
        raise TokenizerError(f"{file}: {_KEY}{name}: found {type(value).__name__}; expected a list")
    return list(plain)


def _integer(value: object, field: str, *, file: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise TokenizerError(f"{file}: {field}: found {value!r}; expected an integer")


def _check_count(name: str, found: int, expected: int, *, file: str) -> None:
    if found != expected:
        raise TokenizerError(
            f"{file}: {_KEY}{name}: found {found} entries for {expected} tokens; "
            "the file is inconsistent, convert or fetch it again"
        )
