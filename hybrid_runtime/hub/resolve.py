"""Turns what a user typed into the folder or file that holds the model.

In this order: a path that exists, an alias, a repository `org/name` (or `org/name:file.gguf`, one GGUF of several).
Nothing else is guessed: a misspelt name is refused with the aliases that look like it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from pathlib import Path

from hybrid_runtime.errors import DownloadError, UsageError
from hybrid_runtime.hub.aliases import ALIASES, close_aliases
from hybrid_runtime.hub.cache import RepoCache, find_snapshot
from hybrid_runtime.hub.download import download_snapshot, place_by_hand
from hybrid_runtime.hub.listing import RepositoryMissingError
from hybrid_runtime.hub.names import check_revision, is_repo_id, parse_model_name
from hybrid_runtime.hub.settings import hub_cache_dir, hub_endpoint, hub_is_offline, hub_token
from hybrid_runtime.progress import Progress

_logger = logging.getLogger(__name__)


def resolve_model(
    name: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Path:
    """The model's folder, or its .gguf file; downloaded when it is neither on disk nor cached."""
    path = _existing_path(name)
    if path is not None:
        if revision is not None:
            raise UsageError(f"--revision {revision} means nothing for {name!r}, which is a path; leave it out")
        return path
    asked = parse_model_name(name)
    repo_ids = _repo_ids(asked.base, name)
    if revision is not None:
        check_revision(revision)
    cache_dir = hub_cache_dir() if cache_dir is None else cache_dir
    allow = None if asked.gguf_file is None else (asked.gguf_file,)
    if offline or hub_is_offline():
        snapshot = _from_cache(repo_ids, revision, cache_dir, allow)
    else:
        snapshot = _from_hub(repo_ids, revision, cache_dir, allow, progress)
    return _model_path(snapshot, asked.gguf_file)


def _existing_path(name: str) -> Path | None:
    if not os.path.exists(name):  # noqa: PTH110 - Path.exists raises for names that no file system can hold
        return None
    path = Path(name)
    if path.is_dir() or (path.is_file() and path.suffix.lower() == ".gguf"):
        return path
    raise UsageError(f"{name!r} is a file of another kind; a model is a folder with config.json, or one .gguf file")


def _repo_ids(base: str, typed: str) -> list[str]:
    """Ids to try in turn: a renamed organisation's new one and former one, beginning with the one that was typed."""
    alias = ALIASES.get(base.lower())
    if alias is not None:
        return [alias.repo_id] if alias.former_repo_id is None else [alias.repo_id, alias.former_repo_id]
    if not is_repo_id(base):
        close = close_aliases(base)
        hint = f"did you mean {' or '.join(close)}?" if close else f"aliases are {', '.join(ALIASES)}"
        raise UsageError(f"unknown model {typed!r}: no such path, alias or repository 'org/name'; {hint}")
    for alias in ALIASES.values():
        if alias.former_repo_id is not None and base in (alias.repo_id, alias.former_repo_id):
            other = alias.former_repo_id if base == alias.repo_id else alias.repo_id
            return [base, other]
    return [base]


def _from_cache(repo_ids: list[str], revision: str | None, cache_dir: Path, allow: Collection[str] | None) -> Path:
    for repo_id in repo_ids:
        snapshot = find_snapshot(RepoCache(cache_dir, repo_id), revision, allow)
        if snapshot is not None:
            _logger.info("offline: using the cached copy %s", snapshot)
            return snapshot
    endpoint = hub_endpoint()
    raise DownloadError(
        f"offline, so {endpoint} was not asked, and {cache_dir} has no complete copy of {' or '.join(repo_ids)}"
        f" (revision {revision or 'main'}). {place_by_hand(repo_ids[0], endpoint)}"
    )


def _from_hub(
    repo_ids: list[str],
    revision: str | None,
    cache_dir: Path,
    allow: Collection[str] | None,
    progress: Progress | None,
) -> Path:
    cached = [repo_id for repo_id in repo_ids if find_snapshot(RepoCache(cache_dir, repo_id), revision, allow)]
    # Hubs answer for a former id too, so a copy cached under it spares a second download of the same files.
    order = cached + [repo_id for repo_id in repo_ids if repo_id not in cached]
    refusals: list[RepositoryMissingError] = []
    for repo_id in order:
        try:
            return download_snapshot(
                repo_id,
                revision=revision,
                cache_dir=cache_dir,
                endpoint=hub_endpoint(),
                token=hub_token(),
                allow=allow,
                progress=progress,
            )
        except RepositoryMissingError as error:
            refusals.append(error)
    raise DownloadError("; ".join(str(error) for error in refusals)) from refusals[0]


def _model_path(snapshot: Path, gguf_file: str | None) -> Path:
    """The GGUF file where the model is one, else the folder."""
    if gguf_file is not None:
        return snapshot / gguf_file
    if any(snapshot.glob("*.safetensors")):
        return snapshot
    ggufs = sorted(path for path in snapshot.rglob("*") if path.suffix.lower() == ".gguf")
    if len(ggufs) > 1:
        names = ", ".join(str(path.relative_to(snapshot)) for path in ggufs)
        raise UsageError(f"{snapshot} holds several GGUF files ({names}); choose one as org/name:file.gguf")
    return ggufs[0] if ggufs else snapshot
