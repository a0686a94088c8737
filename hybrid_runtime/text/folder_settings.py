"""What the small JSON files of a checkpoint folder say about its tokenizer.

tokenizer_config.json, special_tokens_map.json and added_tokens.json name tokens; config.json and
generation_config.json give ids, and often other ends of a turn than the tokenizer itself. All are optional.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hybrid_runtime.errors import TokenizerError
from hybrid_runtime.text.added_tokens import AddedToken, check_added
from hybrid_runtime.text.json_files import flag_field, ids_field, read_json_object, text_field


@dataclass(frozen=True, slots=True)
class NamedId:
    """A token id and the file and field that give it, for a message about it."""

    token_id: int
    source: str


@dataclass(frozen=True, slots=True)
class NamedToken:
    """A token's name and the file and field that give it, for a message about it."""

    text: str
    source: str


@dataclass(frozen=True, slots=True)
class FolderSettings:
    """The folder's word on its tokenizer; None where it says nothing."""

    tokenizer_class: str | None = None
    bos_token: NamedToken | None = None
    eos_token: NamedToken | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool | None = None
    added: tuple[AddedToken, ...] = ()
    bos_ids: tuple[NamedId, ...] = ()
    end_ids: tuple[NamedId, ...] = ()


def read_folder_settings(folder: Path) -> FolderSettings:
    """Read what there is; absent files say nothing, broken ones raise."""
    tokenizer_config = folder / "tokenizer_config.json"
    config = read_json_object(tokenizer_config)
    special_map = read_json_object(folder / "special_tokens_map.json")
    named = ((tokenizer_config, config), (folder / "special_tokens_map.json", special_map))
    return FolderSettings(
        tokenizer_class=text_field(config, "tokenizer_class", file=str(tokenizer_config)),
        bos_token=_named_token("bos_token", named),
        eos_token=_named_token("eos_token", named),
        add_bos=flag_field(config, "add_bos_token", file=str(tokenizer_config)),
        add_eos=flag_field(config, "add_eos_token", file=str(tokenizer_config)),
        add_prefix_space=flag_field(config, "add_prefix_space", file=str(tokenizer_config)),
        legacy=flag_field(config, "legacy", file=str(tokenizer_config)),
        added=_added_tokens(folder, config, special_texts=_special_texts(config, special_map)),
        bos_ids=tuple(_named_ids(folder, "bos_token_id")),
        end_ids=tuple(_named_ids(folder, "eos_token_id")),
    )


def _named_token(key: str, files: Iterable[tuple[Path, Mapping[str, object]]]) -> NamedToken | None:
    for path, content in files:
        text = text_field(content, key, file=str(path))
        if text is not None:
            return NamedToken(text, f"{path}: {key}")
    return None


def _named_ids(folder: Path, key: str) -> Iterable[NamedId]:
    for name in ("generation_config.json", "config.json"):
        content = read_json_object(folder / name)
        text_config = content.get("text_config")  # where a model of more than text keeps its language model
        for part in (content, text_config if isinstance(text_config, dict) else {}):
            for token_id in ids_field(part, key, file=str(folder / name)):
                yield NamedId(token_id, f"{folder / name}: {key}")


def _special_texts(*contents: Mapping[str, object]) -> frozenset[str]:
    """Every name that the files call special, whichever way they write it."""
    texts: set[str] = set()
    for content in contents:
        extra = content.get("additional_special_tokens")
        for value in (*(content.get(f"{role}_token") for role in ("bos", "eos", "unk", "pad")), *_as_list(extra)):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                texts.add(text)
    return frozenset(texts)


def _added_tokens(
    folder: Path, config: Mapping[str, object], *, special_texts: frozenset[str]
) -> tuple[AddedToken, ...]:
    decoder_file, names_file = str(folder / "tokenizer_config.json"), str(folder / "added_tokens.json")
    tokens: list[AddedToken] = []
    decoder = config.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{decoder_file}: added_tokens_decoder: found {decoder!r}; expected an object")
    for key, entry in decoder.items():
        tokens.append(_decoder_entry(key, entry, file=decoder_file))
    for text, token_id in read_json_object(folder / "added_tokens.json").items():
        if type(token_id) is not int:
            raise TokenizerError(f"{names_file}: {text!r}: found {token_id!r}; expected a token id")
        tokens.append(AddedToken(text, token_id, special=text in special_texts))
    return check_added(tokens, file=str(folder), field="added_tokens_decoder and added_tokens.json")


def _decoder_entry(key: str, entry: object, *, file: str) -> AddedToken:
    if not key.isdecimal() or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        raise TokenizerError(f"{file}: added_tokens_decoder[{key!r}]: expected an id and an object with content")
    return AddedToken(
        entry["content"],
        int(key),
        special=entry.get("special") is True,
        lstrip=entry.get("lstrip") is True,
        rstrip=entry.get("rstrip") is True,
        single_word=entry.get("single_word") is True,
    )


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
