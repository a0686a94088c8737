"""Chooses which of a repository's files are fetched: what is read, and nothing that could run.

Wanted are the configuration, the tokenizer and the weights as safetensors or as one GGUF. Pickles (.bin, .pt, .ckpt)
execute code when they are loaded and Python files are code, so neither is ever downloaded. Of weights published twice
(Mistral's `consolidated.safetensors` beside the shards) only one copy is taken.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from hybrid_runtime.errors import CheckpointError, UsageError

SMALL_FILES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    }
)
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
CODE_SUFFIXES = (".py", ".pyc", ".so", ".sh")

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")


def select_files(names: Collection[str], repo_id: str, allow: Collection[str] | None) -> list[str]:
    """Names to fetch, small files first. `allow` names the wanted weight files; None chooses them."""
    weights = _choose_weights(names, repo_id) if allow is None else _check_allowed(names, repo_id, allow)
    small = [name for name in sorted(SMALL_FILES.intersection(names)) if name not in weights]
    return small + weights


def missing_shards(names: Iterable[str]) -> list[str]:
    """Shards that the numbering of the present ones promises and that are not there."""
    present = set(names)
    series = {(shard["stem"], shard["count"]) for name in present if (shard := _SHARD.fullmatch(name))}
    promised = {
        f"{stem}-{number:05d}-of-{count}.safetensors" for stem, count in series for number in range(1, int(count) + 1)
    }
    return sorted(promised - present)


def _choose_weights(names: Collection[str], repo_id: str) -> list[str]:
    safetensors = _safetensors(names)
    if safetensors:
        missing = missing_shards(safetensors)
        if missing:
            raise CheckpointError(
                f"{repo_id}: {len(missing)} of its weight files are not in the repository, the first is {missing[0]};"
                " the upload is incomplete, choose another revision or tell its publisher"
            )
        return [name for name in (INDEX_FILE,) if name in names] + safetensors
    ggufs = sorted(name for name in names if name.lower().endswith(".gguf"))
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise UsageError(f"{repo_id} holds {len(ggufs)} GGUF files; choose one as {_examples(repo_id, ggufs)}")
    raise _no_weights(names, repo_id)


def _safetensors(names: Collection[str]) -> list[str]:
    """The safetensors of one copy of the model, all at the repository's root."""
    root = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if INDEX_FILE in names:
        shards = [name for name in root if (shard := _SHARD.fullmatch(name)) and shard["stem"] == "model"]
        return shards or root
    return [SINGLE_FILE] if SINGLE_FILE in root else root


def _check_allowed(names: Collection[str], repo_id: str, allow: Collection[str]) -> list[str]:
    for name in allow:
        if name.lower().endswith(PICKLE_SUFFIXES + CODE_SUFFIXES):
            raise UsageError(f"{repo_id}: {name} is a pickle or code, which is never downloaded; choose safetensors")
        if name not in names:
            ggufs = sorted(other for other in names if other.lower().endswith(".gguf"))
            there = f"it has {_examples(repo_id, ggufs)}" if ggufs else "it has no GGUF file at all"
            raise UsageError(f"{repo_id} has no file {name!r}; {there}")
    return sorted(allow)


def _examples(repo_id: str, ggufs: list[str]) -> str:
    shown = ", ".join(f"{repo_id}:{name}" for name in ggufs[:12])
    return shown if len(ggufs) <= 12 else f"{shown} and {len(ggufs) - 12} more"


def _no_weights(names: Collection[str], repo_id: str) -> CheckpointError:
    pickles = sorted(name for name in names if name.lower().endswith(PICKLE_SUFFIXES))
    if not pickles:
        return CheckpointError(f"{repo_id} holds no weights; expected *.safetensors or *.gguf at its root")
    shown = ", ".join(pickles[:4]) + (f" and {len(pickles) - 4} more" if len(pickles) > 4 else "")
    return CheckpointError(
        f"{repo_id} holds its weights only as pickles ({shown}). A pickle can run any program when it is opened, so"
        " this runtime never loads one. Convert it elsewhere, in a throw-away machine or container: load it with"
        " transformers, call save_pretrained(folder, safe_serialization=True), and give that folder here"
    )
