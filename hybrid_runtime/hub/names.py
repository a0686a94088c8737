r"""Checks every name that becomes a path or an URL, whoever sent it.

Two strangers name things here. The user types a model's name, where a typing mistake deserves a helpful refusal. The
hub's server lists files, hashes and a commit, each of which is about to be joined to a folder of ours: a digest
`../../x` or a file `..\x` would write outside the cache (CVE-2024-37032 was this), so whatever is not plainly harmless
is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hybrid_runtime.errors import DownloadError, UsageError

MAX_NAME_CHARS = 200
MAX_PART_BYTES = 255  # what Linux, macOS and Windows file systems allow for one component

_REPO_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DRIVE = re.compile(r"[A-Za-z]:")
_WINDOWS_FORBIDS = frozenset('<>:"|?*\\')


@dataclass(frozen=True, slots=True)
class ModelName:
    """What a user typed, taken apart: an alias or a repository, and perhaps one GGUF file in it."""

    base: str
    gguf_file: str | None


def parse_model_name(typed: str) -> ModelName:
    """Split 'org/name:file.gguf', refusing what could not be an alias or a repository on any hub."""
    check_typed(typed)
    base, colon, file = typed.partition(":")
    if base.startswith(("/", "~", ".")) or "\\" in typed or ".." in base.split("/"):
        raise UsageError(
            f"model {typed!r}: there is no such path, and it is not a repository 'org/name' either;"
            " give an existing folder or .gguf file, an alias, or org/name"
        )
    if not colon:
        return ModelName(base, None)
    if not file.lower().endswith(".gguf") or not is_safe_file(file):
        raise UsageError(
            f"model {typed!r}: found {file!r} after the colon, expected the name of one .gguf file in {base!r}"
        )
    return ModelName(base, file)


def check_typed(typed: str) -> None:
    """Refuse a name that no file system and no hub could hold; it may be an existing path of any length."""
    if not typed.strip():
        raise UsageError("model name is empty; give a folder, a .gguf file, an alias or org/name")
    if not typed.isprintable():
        raise UsageError(f"model {printable(typed)} has control or unprintable characters; expected plain text")
    if len(typed) > MAX_NAME_CHARS:
        raise UsageError(
            f"model {typed[:40]!r}... has {len(typed)} characters and is no existing path;"
            f" expected at most {MAX_NAME_CHARS}"
        )


def is_repo_id(text: str) -> bool:
    """Whether `text` is 'org/name' as hubs allow it: no '..', no '--', two parts."""
    parts = text.split("/")
    return (
        len(parts) == 2
        and len(text) <= 96
        and all(_REPO_PART.fullmatch(part) for part in parts)
        and ".." not in text
        and "--" not in text
    )


def check_revision(revision: str) -> None:
    """Refuse a branch, tag or commit that could leave the cache's refs folder."""
    parts = revision.split("/")
    if (
        not _REVISION.fullmatch(revision)
        or len(revision) > MAX_NAME_CHARS
        or any(not part or part.startswith(".") or ".." in part for part in parts)
    ):
        raise UsageError(f"revision {revision[:MAX_NAME_CHARS]!r} is not the name of a branch, a tag or a commit")


def is_commit(text: str) -> bool:
    """Whether `text` is a full commit hash, which names one state for ever."""
    return _COMMIT.fullmatch(text) is not None


def is_sha256(text: str) -> bool:
    """Whether `text` is a sha256 in lower-case hexadecimal."""
    return _SHA256.fullmatch(text) is not None


def is_sha1(text: str) -> bool:
    """Whether `text` is a sha1 in lower-case hexadecimal."""
    return _SHA1.fullmatch(text) is not None


def is_safe_file(name: str) -> bool:
    """Whether a file's name from outside stays below the folder it is joined to, on every operating system."""
    return (
        0 < len(name) <= 4 * MAX_PART_BYTES
        and name.isprintable()
        and not _WINDOWS_FORBIDS.intersection(name)
        and all(_is_safe_part(part) for part in name.split("/"))
    )


def check_server_file(name: str, repo_id: str) -> None:
    """Refuse a whole repository that lists a file outside itself: it is broken or hostile."""
    escapes = (
        name.startswith("/")
        or "\\" in name
        or _DRIVE.match(name)
        or any(ord(char) < 32 or ord(char) == 127 for char in name)
        or any(not part.rstrip(" .") for part in name.split("/"))
    )
    if escapes:
        raise DownloadError(
            f"{repo_id}: the hub lists a file named {printable(name)}, expected a relative path without '..',"
            " backslash or drive letter; nothing of this repository is downloaded"
        )


def printable(text: str) -> str:
    """A short, harmless rendering for messages: escapes are spelled out, long names are cut."""
    shown = ascii(text[:80])
    return shown if len(text) <= 80 else f"{shown}..."


def _is_safe_part(part: str) -> bool:
    # Windows drops trailing dots and spaces, so '.. ' would become '..' there.
    return bool(part) and part == part.strip() and not part.endswith(".") and len(part.encode()) <= MAX_PART_BYTES
