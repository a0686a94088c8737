"""Finds a tokenizer: in a checkpoint folder, in a store, in one file, or in a GGUF file's metadata.

This module only chooses; reading is done by the vocabularies, `folder_settings` and `gguf_vocabulary`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from hybrid_runtime.errors import TemplateError, TokenizerError
from hybrid_runtime.text.added_tokens import AddedToken
from hybrid_runtime.text.bpe_splits import bpe_split
from hybrid_runtime.text.folder_settings import FolderSettings, read_folder_settings
from hybrid_runtime.text.gguf_vocabulary import gguf_tokenizer
from hybrid_runtime.text.json_files import parse_json_object, read_bytes, read_json_object
from hybrid_runtime.text.read_saved import read_saved_tokenizer
from hybrid_runtime.text.saved_form import SETTINGS_FILE
from hybrid_runtime.text.sentencepiece_vocabulary import TOKENIZER_MODEL, SentencePieceVocabulary, SpacePrefix
from hybrid_runtime.text.special_ids import folder_special_ids
from hybrid_runtime.text.tokenizer import SpecialIds, Tokenizer, Vocabulary, VocabularyTokenizer
from hybrid_runtime.text.tokenizers_vocabulary import (
    TOKENIZER_JSON,
    TokenizersVocabulary,
    byte_level_bpe,
    read_tokenizer_json,
)

_SPLIT_OF_CLASS = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}  # what vocab.json itself does not tell


def load_tokenizer(folder: Path, *, extra_end_ids: Iterable[int] = ()) -> Tokenizer:
    """The tokenizer of a checkpoint folder or of a store; `extra_end_ids` end a turn too."""
    if not folder.is_dir():
        raise TokenizerError(f"{folder}: not a folder; give the folder that holds {TOKENIZER_JSON}")
    if (folder / SETTINGS_FILE).is_file():
        return read_saved_tokenizer(folder, extra_end_ids=extra_end_ids)
    settings = read_folder_settings(folder)
    path, vocabulary = _folder_vocabulary(folder, settings)
    return _surrounded(vocabulary, settings, file=str(path), extra_end_ids=extra_end_ids)


def load_tokenizer_file(path: Path, *, extra_end_ids: Iterable[int] = ()) -> Tokenizer:
    """The tokenizer in one file of any name, tokenizer.json or sentencepiece model; files beside it do not count."""
    data = read_bytes(path)
    settings = FolderSettings()
    vocabulary: Vocabulary
    if data.lstrip()[:1] == b"{":
        vocabulary = read_tokenizer_json(data, file=str(path))
    else:
        vocabulary = SentencePieceVocabulary(data, (), SpacePrefix.FIRST, file=str(path))
    return _surrounded(vocabulary, settings, file=str(path), extra_end_ids=extra_end_ids)


def tokenizer_from_gguf(metadata: Mapping[str, object], *, file: str) -> Tokenizer:
    """The tokenizer that a GGUF file's parsed metadata describes; `file` is for messages."""
    return gguf_tokenizer(metadata, file=file)


def find_chat_template(folder: Path) -> str | None:
    """The folder's chat template: a file of its own, or one in tokenizer_config.json; None where there is none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TemplateError(f"{path}: cannot be read as UTF-8 text: {error}; fetch the file again") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_json_object(folder / name).get("chat_template")
        if template is not None:
            return _default_template(template, file=str(folder / name))
    return None


def _default_template(template: object, *, file: str) -> str | None:
    if isinstance(template, str):
        return template
    if not isinstance(template, list):
        raise TemplateError(f"{file}: chat_template: found {type(template).__name__}; expected a string or a list")
    for idx, entry in enumerate(template):
        if not isinstance(entry, dict) or not isinstance(entry.get("template"), str):
            raise TemplateError(f"{file}: chat_template[{idx}]: expected an object with name and template")
        if entry.get("name") == "default":
            return str(entry["template"])
    return None


def _surrounded(
    vocabulary: Vocabulary, settings: FolderSettings, *, file: str, extra_end_ids: Iterable[int]
) -> VocabularyTokenizer:
    special: SpecialIds = folder_special_ids(vocabulary, settings, file=file, extra_end_ids=extra_end_ids)
    return VocabularyTokenizer(vocabulary, special)


def _folder_vocabulary(folder: Path, settings: FolderSettings) -> tuple[Path, Vocabulary]:
    path = folder / TOKENIZER_JSON
    if path.is_file():
        return path, read_tokenizer_json(read_bytes(path), file=str(path), added=settings.added)
    path = folder / TOKENIZER_MODEL
    if path.is_file():
        return path, SentencePieceVocabulary(read_bytes(path), settings.added, _space_prefix(settings), file=str(path))
    path = folder / "vocab.json"
    if path.is_file() and (folder / "merges.txt").is_file():
        return path, _bpe_files(folder, settings)
    raise TokenizerError(
        f"{folder}: no tokenizer found; expected {TOKENIZER_JSON}, {TOKENIZER_MODEL}, or vocab.json with merges.txt"
    )


def _space_prefix(settings: FolderSettings) -> SpacePrefix:
    if settings.add_prefix_space is False:
        return SpacePrefix.NONE
    return SpacePrefix.EVERY if settings.legacy else SpacePrefix.FIRST


def _bpe_files(folder: Path, settings: FolderSettings) -> TokenizersVocabulary:
    """vocab.json and merges.txt, the older form of byte-level BPE, which OPT is still published in."""
    split_name = _SPLIT_OF_CLASS.get((settings.tokenizer_class or "").removesuffix("Fast"))
    if split_name is None:
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: tokenizer_class: found {settings.tokenizer_class!r}; with vocab.json "
            f"and no {TOKENIZER_JSON}, known are {', '.join(sorted(_SPLIT_OF_CLASS))}"
        )
    file = str(folder / "vocab.json")
    vocabulary: dict[str, int] = {}
    for text, token_id in parse_json_object(read_bytes(folder / "vocab.json"), file=file).items():
        if type(token_id) is not int:
            raise TokenizerError(f"{file}: {text!r}: found {token_id!r}; expected a token id")
        vocabulary[text] = token_id
    merges = _read_merges(folder / "merges.txt")
    added = {token.text: token for token in settings.added}
    for named in (settings.bos_token, settings.eos_token):
        if named is not None and named.text in vocabulary:
            added.setdefault(named.text, AddedToken(named.text, vocabulary[named.text], special=True))
    return byte_level_bpe(vocabulary, merges, bpe_split(split_name, file=file), list(added.values()), file=file)


def _read_merges(path: Path) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    try:
        lines = read_bytes(path).decode().splitlines()
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 text: {error}; fetch the file again") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pieces = line.split(" ")
        if len(pieces) != 2 or not all(pieces):
            raise TokenizerError(f"{path}: line {number}: found {line!r}; expected two pieces with a space between")
        merges.append((pieces[0], pieces[1]))
    return merges
