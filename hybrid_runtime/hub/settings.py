"""The environment variables that Hugging Face's tools share, read when they are needed.

huggingface_hub reads most of them once, at import; here a value set later (by a test, by a command line's own flag)
still counts, and endpoint and cache are passed on as arguments.
"""

from __future__ import annotations

import os
from pathlib import Path

DEFAULT_ENDPOINT = "https://huggingface.co"
_TRUE_WORDS = frozenset({"1", "ON", "YES", "TRUE"})


def hub_endpoint() -> str:
    """Address of the hub: HF_ENDPOINT, or huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def hub_cache_dir() -> Path:
    """Folder that all Hugging Face tools cache in: HF_HUB_CACHE, or hub/ below HF_HOME or the user's cache folder."""
    explicit = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if explicit:
        return Path(os.path.expandvars(explicit)).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        home = str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(os.path.expandvars(home)).expanduser() / "hub"


def hub_is_offline() -> bool:
    """Whether HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids the network."""
    return _is_true("HF_HUB_OFFLINE") or _is_true("TRANSFORMERS_OFFLINE")


def symlinks_are_forbidden() -> bool:
    """Whether HF_HUB_DISABLE_SYMLINKS asks for files in place of links."""
    return _is_true("HF_HUB_DISABLE_SYMLINKS")


def hub_token() -> str | None:
    """The user's access token: HF_TOKEN, or the one that `hf auth login` saved."""
    if _is_true("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        return None
    from huggingface_hub import get_token  # noqa: PLC0415 - slow to import

    return get_token()


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").upper() in _TRUE_WORDS
