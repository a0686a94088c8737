"""Where Hugging Face's tools keep what they downloaded, so that every tool finds what any of them fetched.

    models--org--name/blobs/<sha256 or git sha1>     contents, named by their hash
    models--org--name/snapshots/<commit>/<file>      links to blobs: what a reader opens
    models--org--name/refs/<branch>                  the commit that a branch was at
    .locks/models--org--name/<hash>.lock             held while a blob is written

Nothing appears below snapshots/ before its contents are whole and verified, and a ref is written last of all: who
follows a ref finds a complete snapshot. This module moves no bytes over the network.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from hybrid_runtime.hub.names import is_commit, is_safe_file
from hybrid_runtime.hub.selection import INDEX_FILE, missing_shards
from hybrid_runtime.hub.settings import symlinks_are_forbidden

DEFAULT_REVISION = "main"


@dataclass(frozen=True, slots=True)
class RepoCache:
    """The cache's folders of one repository."""

    cache_dir: Path
    repo_id: str

    @property
    def folder(self) -> Path:
        """Everything of this repository."""
        return self.cache_dir / self._folder_name

    def blob(self, digest: str) -> Path:
        """Contents with this hash; whole if it is there."""
        return self.folder / "blobs" / digest

    def lock(self, digest: str) -> Path:
        """Lock file that huggingface_hub takes for the same blob."""
        return self.cache_dir / ".locks" / self._folder_name / f"{digest}.lock"

    def snapshot(self, commit: str) -> Path:
        """The repository as it was at one commit."""
        return self.folder / "snapshots" / commit

    @property
    def _folder_name(self) -> str:
        return "--".join(["models", *self.repo_id.split("/")])


def find_snapshot(cache: RepoCache, revision: str | None, allow: Collection[str] | None) -> Path | None:
    """The cached snapshot of a revision, if all that a download would have brought is there."""
    commit = revision or DEFAULT_REVISION
    if not is_commit(commit):
        try:
            commit = (cache.folder / "refs" / commit).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
    if not is_commit(commit):
        return None
    snapshot = cache.snapshot(commit)
    return snapshot if is_complete(snapshot, allow) else None


def is_complete(snapshot: Path, allow: Collection[str] | None) -> bool:
    """Whether a snapshot has its configuration and all its weights. Links to blobs that are gone do not count."""
    if allow is not None:
        return all((snapshot / name).is_file() for name in allow)
    if not snapshot.is_dir():
        return False
    present = [path.name for path in snapshot.iterdir() if path.is_file()]
    safetensors = [name for name in present if name.endswith(".safetensors")]
    if safetensors:
        return "config.json" in present and not missing_shards(safetensors) and _has_indexed(snapshot, present)
    return INDEX_FILE not in present and any(name.lower().endswith(".gguf") for name in present)


def write_ref(cache: RepoCache, revision: str | None, commit: str) -> None:
    """Note which commit a branch or tag was at; a full commit needs no note."""
    name = revision or DEFAULT_REVISION
    if not is_commit(name):
        path = cache.folder / "refs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        temporary.write_text(commit, encoding="ascii")
        temporary.replace(path)


def link_blob(cache: RepoCache, digest: str, commit: str, name: str) -> None:
    """Show a finished blob in a snapshot: a symbolic link, else a hard link, else a copy. Never partly."""
    blob, entry = cache.blob(digest), cache.snapshot(commit) / name
    if _shows(entry, blob):
        return
    entry.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(entry)
    try:
        _link_or_copy(blob, temporary)
        temporary.replace(entry)
    finally:
        temporary.unlink(missing_ok=True)


def _shows(entry: Path, blob: Path) -> bool:
    """Whether a snapshot's entry is this blob, or (where links are impossible) a whole file of its size."""
    if not entry.exists():
        return False
    return entry.samefile(blob) or (not entry.is_symlink() and entry.stat().st_size == blob.stat().st_size)


def _link_or_copy(blob: Path, temporary: Path) -> None:
    if not symlinks_are_forbidden():
        try:
            temporary.symlink_to(os.path.relpath(blob, temporary.parent))
        except OSError:  # Windows without the privilege, FAT, some network drives
            pass
        else:
            return
    try:
        os.link(blob.resolve(), temporary)
    except OSError:
        shutil.copyfile(blob, temporary)
        with temporary.open("rb+") as copy:
            os.fsync(copy.fileno())


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex[:8]}.tmp")


def _has_indexed(snapshot: Path, present: Collection[str]) -> bool:
    """Whether the shards that the index names are all there; true without an index."""
    if INDEX_FILE not in present:
        return True
    try:
        index = json.loads((snapshot / INDEX_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        return False
    shards = {shard for shard in weight_map.values() if isinstance(shard, str) and is_safe_file(shard)}
    return bool(shards) and all((snapshot / shard).is_file() for shard in shards)
