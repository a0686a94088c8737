"""Reads a tokenizer that `VocabularyTokenizer.save` wrote: one settings file and the vocabulary's own file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from hybrid_runtime.errors import TokenizerError
from hybrid_runtime.text.added_tokens import AddedToken
from hybrid_runtime.text.folder_settings import NamedId
from hybrid_runtime.text.json_files import flag_field, ids_field, read_bytes, read_json_object, text_field
from hybrid_runtime.text.saved_form import FORMAT_VERSION, SETTINGS_FILE
from hybrid_runtime.text.sentencepiece_vocabulary import TOKENIZER_MODEL, SentencePieceVocabulary, SpacePrefix
from hybrid_runtime.text.special_ids import checked_id
from hybrid_runtime.text.tokenizer import SpecialIds, Vocabulary, VocabularyTokenizer
from hybrid_runtime.text.tokenizers_vocabulary import TOKENIZER_JSON, read_tokenizer_json


def read_saved_tokenizer(folder: Path, *, extra_end_ids: Iterable[int]) -> VocabularyTokenizer:
    """The tokenizer of a store, the same as the one that was saved."""
    path = folder / SETTINGS_FILE
    settings = read_json_object(path)
    if settings.get("format") != "hybrid-tokenizer" or settings.get("version") != FORMAT_VERSION:
        raise TokenizerError(
            f"{path}: found format {settings.get('format')!r} version {settings.get('version')!r}; this release reads "
            f"'hybrid-tokenizer' version {FORMAT_VERSION}; convert the model again"
        )
    vocabulary = _vocabulary(folder, settings, file=str(path))

    def ids(key: str) -> tuple[int, ...]:
        named = (NamedId(token_id, f"{path}: {key}") for token_id in ids_field(settings, key, file=str(path)))
        return tuple(checked_id(vocabulary, named_id) for named_id in named)

    extra = (checked_id(vocabulary, NamedId(token_id, "extra_end_ids")) for token_id in extra_end_ids)
    special = SpecialIds(
        bos_id=next(iter(ids("bos_id")), None),
        eos_id=next(iter(ids("eos_id")), None),
        prefix_ids=ids("prefix_ids"),
        suffix_ids=ids("suffix_ids"),
        end_ids=frozenset([*ids("end_ids"), *extra]),
    )
    return VocabularyTokenizer(vocabulary, special)


def _vocabulary(folder: Path, settings: Mapping[str, object], *, file: str) -> Vocabulary:
    backend = text_field(settings, "backend", file=file)
    if backend == "tokenizers":
        path = folder / TOKENIZER_JSON
        return read_tokenizer_json(read_bytes(path), file=str(path))
    if backend == "sentencepiece":
        path = folder / TOKENIZER_MODEL
        prefix = text_field(settings, "space_prefix", file=file)
        if prefix not in set(SpacePrefix):
            raise TokenizerError(f"{file}: space_prefix: found {prefix!r}; known are {', '.join(SpacePrefix)}")
        added = tuple(_added_tokens(settings, file=file))
        return SentencePieceVocabulary(read_bytes(path), added, SpacePrefix(prefix), file=str(path))
    raise TokenizerError(f"{file}: backend: found {backend!r}; known are 'sentencepiece' and 'tokenizers'")


def _added_tokens(settings: Mapping[str, object], *, file: str) -> Iterable[AddedToken]:
    entries = settings.get("added_tokens", [])
    if not isinstance(entries, list):
        raise TokenizerError(f"{file}: added_tokens: found {type(entries).__name__}; expected a list")
    for idx, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise TokenizerError(f"{file}: added_tokens[{idx}]: found {entry!r}; expected an object")
        text, token_ids = text_field(entry, "text", file=file), ids_field(entry, "token_id", file=file)
        if text is None or len(token_ids) != 1:
            raise TokenizerError(f"{file}: added_tokens[{idx}]: found {entry!r}; expected a text and one token_id")
        flags = {
            key: flag_field(entry, key, file=file) is True for key in ("special", "lstrip", "rstrip", "single_word")
        }
        yield AddedToken(text, token_ids[0], **flags)
