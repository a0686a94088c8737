"""Downloads one repository's model into the shared cache, or finds it there.

The order makes interruptions harmless: list, choose files, check the disk, fetch and verify every blob, then link them
all into the snapshot, then note the branch. Without a network a complete cached snapshot is as good, and is used with
a warning.
"""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hybrid_runtime import __version__
from hybrid_runtime.errors import BudgetError, DownloadError, UsageError
from hybrid_runtime.hub.cache import RepoCache, find_snapshot, link_blob, write_ref
from hybrid_runtime.hub.listing import HubUnreachableError, Listing, RemoteFile, RetryPolicy, fetch_listing
from hybrid_runtime.hub.names import check_revision, is_commit, is_repo_id, is_safe_file, printable
from hybrid_runtime.hub.selection import select_files
from hybrid_runtime.hub.transfer import Source, fetch_blob, incomplete_path
from hybrid_runtime.progress import NoProgress, Progress
from hybrid_runtime.sizes import format_decimal_bytes
from hybrid_runtime.whole_files import sync_folder

DEFAULT_RETRY = RetryPolicy()
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_LOCK_PATIENCE_S = 0.2

_logger = logging.getLogger(__name__)


def download_snapshot(
    repo_id: str,
    *,
    revision: str | None,
    cache_dir: Path,
    endpoint: str,
    token: str | None,
    allow: Collection[str] | None,
    progress: Progress | None,
    retry: RetryPolicy = DEFAULT_RETRY,
) -> Path:
    """The snapshot folder of a repository, downloaded as far as it is missing.

    `allow` names the wanted weight files (one GGUF of several); None chooses the safetensors, or the only GGUF.
    `token` None means none: `settings.hub_token` finds the user's.
    """
    _check_arguments(repo_id, revision, allow, endpoint)
    endpoint = endpoint.rstrip("/")
    cache = RepoCache(cache_dir, repo_id)
    cached = find_snapshot(cache, revision, allow)
    if cached is not None and revision is not None and is_commit(revision):
        return cached  # a commit never changes
    # Who has the model already should not wait for a dead line.
    patience = retry if cached is None else replace(retry, attempts=1)
    try:
        listing = fetch_listing(repo_id, revision=revision, endpoint=endpoint, token=token or False, retry=patience)
    except HubUnreachableError as error:
        if cached is None:
            raise HubUnreachableError(f"{error}. {place_by_hand(repo_id, endpoint)}") from error
        _logger.warning("%s; going on with the cached copy %s", error, cached)
        return cached
    files = [listing.files[name] for name in select_files(listing.files, repo_id, allow)]
    try:
        missing = [file for file in files if not _is_present(file, listing.commit, cache)]
        if missing:
            _check_disk(missing, cache)
            sources = _sources(missing, listing, endpoint, token)
            _fetch_all(sources, listing.commit, cache, progress=progress or NoProgress(), retry=retry)
        return _publish(files, listing, cache, revision)
    except OSError as error:
        raise _explain(error, cache_dir) from error


def place_by_hand(repo_id: str, endpoint: str) -> str:
    """How to bring a model to a machine that cannot download it."""
    return (
        f"To do without: on a machine that reaches {endpoint}/{repo_id}, download config.json, the tokenizer files and"
        " all *.safetensors into one folder, copy that folder here, and give its path in place of the name"
    )


def free_disk_bytes(folder: Path) -> int:
    """Free space of the disk that `folder` is or will be on."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _check_arguments(repo_id: str, revision: str | None, allow: Collection[str] | None, endpoint: str) -> None:
    if not endpoint.startswith(("https://", "http://")):
        raise UsageError(f"HF_ENDPOINT is {endpoint!r}, expected an address that starts with https:// or http://")
    if not is_repo_id(repo_id):
        raise UsageError(f"{printable(repo_id)} is not a repository; expected 'org/name'")
    if revision is not None:
        check_revision(revision)
    for name in allow or ():
        if not is_safe_file(name):
            raise UsageError(f"{printable(name)} is not the name of a file in {repo_id}")


def _sources(
    missing: Sequence[RemoteFile], listing: Listing, endpoint: str, token: str | None
) -> dict[RemoteFile, Source]:
    """Where each file comes from: pinned to the commit that was listed, whatever is pushed meanwhile."""
    from huggingface_hub import hf_hub_url  # noqa: PLC0415 - slow to import

    headers = {"User-Agent": f"hybrid-runtime/{__version__}"}
    if token:
        headers["Authorization"] = f"Bearer {token}"  # the client drops it when a redirect leaves the hub
    return {
        file: Source(
            hf_hub_url(listing.repo_id, file.name, revision=listing.commit, endpoint=endpoint),
            headers,
            listing.repo_id,
            endpoint,
        )
        for file in missing
    }


def _fetch_all(
    sources: Mapping[RemoteFile, Source], commit: str, cache: RepoCache, *, progress: Progress, retry: RetryPolicy
) -> None:
    progress.start(f"{cache.repo_id} ({len(sources)} files)", sum(file.num_bytes for file in sources))
    try:
        for file, source in sources.items():
            with _blob_lock(cache, file):
                if _is_present(file, commit, cache):  # by a process that held the lock before us
                    progress.advance(file.num_bytes)
                else:
                    fetch_blob(file, source, cache.blob(file.digest), retry=retry, progress=progress)
    finally:
        progress.done()


def _publish(files: Sequence[RemoteFile], listing: Listing, cache: RepoCache, revision: str | None) -> Path:
    """Show the verified blobs as a snapshot, weights last, and only then let the branch point to it."""
    blobs = cache.folder / "blobs"
    if blobs.is_dir():
        sync_folder(blobs)  # once for all renames: a link must not outlive its blob
    for file in files:
        if _size(cache.blob(file.digest)) == file.num_bytes:
            link_blob(cache, file.digest, listing.commit, file.name)
    write_ref(cache, revision, listing.commit)
    return cache.snapshot(listing.commit)


def _check_disk(missing: Sequence[RemoteFile], cache: RepoCache) -> None:
    """Refuse before the first byte what cannot end well."""
    needed = sum(file.num_bytes - min(file.num_bytes, _part_bytes(file, cache)) for file in missing)
    free = free_disk_bytes(cache.cache_dir)
    if needed > free:
        raise BudgetError(
            f"{cache.repo_id} needs {format_decimal_bytes(needed)} more on disk ({needed} bytes), and "
            f"{cache.cache_dir} has {format_decimal_bytes(free)} free ({free} bytes); "
            "free some, or set HF_HOME to a folder on a larger disk"
        )


def _part_bytes(file: RemoteFile, cache: RepoCache) -> int:
    return _size(incomplete_path(cache.blob(file.digest))) or 0


def _is_present(file: RemoteFile, commit: str, cache: RepoCache) -> bool:
    """Whether the contents are there: as a blob, or where links are impossible as the snapshot's own file."""
    places = (cache.blob(file.digest), cache.snapshot(commit) / file.name)
    return any(_size(place) == file.num_bytes for place in places)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextmanager
def _blob_lock(cache: RepoCache, file: RemoteFile) -> Iterator[None]:
    """Hold the lock that huggingface_hub would take; tell the user before waiting for another process."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # noqa: PLC0415 - slow to import

    path = cache.lock(file.digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = WeakFileLock(path, timeout=_LOCK_PATIENCE_S)
    try:
        lock.__enter__()
    except TimeoutError:
        _logger.warning("waiting for another process that is downloading %s of %s", file.name, cache.repo_id)
        lock = WeakFileLock(path)
        lock.__enter__()
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def _explain(error: OSError, cache_dir: Path) -> DownloadError | BudgetError:
    where = error.filename or cache_dir
    if error.errno in _DISK_FULL:
        return BudgetError(
            f"{where}: the disk is full ({format_decimal_bytes(free_disk_bytes(cache_dir))} free). What has arrived is "
            "kept;"
            " free some space and run again, or set HF_HOME to a folder on a larger disk"
        )
    return DownloadError(
        f"{where}: {error.strerror or error}; the cache must be a folder that can be written,"
        " choose another with HF_HOME"
    )
