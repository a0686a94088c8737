"""Asks the hub what a repository holds: commit, files, sizes and hashes, all checked before anything relies on them.

huggingface_hub makes the request (address, token, proxies, redirects); this module turns its answer into frozen data
and its many errors into four: unknown repository, no access, unreachable, nonsense.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from hybrid_runtime.errors import DownloadError
from hybrid_runtime.hub.names import check_server_file, is_commit, is_safe_file, is_sha1, is_sha256, printable

if TYPE_CHECKING:  # huggingface_hub takes half a second to import, which `--help` need not wait for
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

LISTING_ATTEMPTS = 3  # nothing is lost yet, so the user should hear soon that the hub is away
MAX_FILE_BYTES = 2**50  # a promise above this is nonsense, and arithmetic on it would only hide that


class RepositoryMissingError(DownloadError):
    """The hub knows no such repository, or hides it from this token."""


class HubUnreachableError(DownloadError):
    """No sound answer came from the hub; what is cached may still do."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How patient to be with a bad line; waits double from the first to the longest."""

    attempts: int = 6
    first_wait_s: float = 1.0
    longest_wait_s: float = 30.0
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.first_wait_s < 0 or self.longest_wait_s < 0 or self.timeout_s <= 0:
            raise ValueError(f"{self}: attempts and timeout_s must be positive, waits not negative")

    def wait(self, failures: int, asked_s: float | None = None) -> None:
        """Sleep before the next attempt: as long as the server asked, within reason, or else doubling."""
        own_s = min(self.longest_wait_s, self.first_wait_s * 2 ** (failures - 1))
        time.sleep(own_s if asked_s is None else min(self.longest_wait_s, max(own_s, asked_s)))


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file as the hub promises it; `digest` is also its name among the cache's blobs."""

    name: str
    num_bytes: int
    digest: str
    is_lfs: bool  # digest is a sha256 of the contents; else a git blob's sha1

    @property
    def hash_name(self) -> str:
        """How the digest is called in messages."""
        return "sha256" if self.is_lfs else "git sha1"


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one commit."""

    repo_id: str
    commit: str
    files: dict[str, RemoteFile]


def fetch_listing(
    repo_id: str, *, revision: str | None, endpoint: str, token: str | bool | None, retry: RetryPolicy
) -> Listing:
    """The repository's files at `revision` (its main branch when None)."""
    from huggingface_hub import HfApi  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled  # noqa: PLC0415

    api = HfApi(endpoint=endpoint, token=token)
    failures = 0
    while True:
        try:
            info = api.model_info(repo_id, revision=revision, files_metadata=True, timeout=retry.timeout_s)
            return _read_listing(info, repo_id, endpoint)
        except OfflineModeIsEnabled as error:
            raise HubUnreachableError(f"{endpoint} was not asked: HF_HUB_OFFLINE forbids it") from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status not in (408, 429) and status < 500:
                _raise_refusal(error, repo_id, revision, endpoint)
            reason = f"it answered HTTP {status}"
        except http_error() as error:
            reason = f"{type(error).__name__}: {error}"
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            # a captive portal's HTML, or JSON of another shape: asking again brings the same
            raise HubUnreachableError(f"{endpoint}: its answer about {repo_id} is no listing of a model") from error
        failures += 1
        if failures >= min(retry.attempts, LISTING_ATTEMPTS):
            raise HubUnreachableError(f"{endpoint} cannot be reached for {repo_id} ({failures} attempts; {reason})")
        retry.wait(failures)


def http_error() -> type[Exception]:
    """Base of what the HTTP client under huggingface_hub raises: httpx's up to 1.x, httpx2's since 2.0."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # noqa: PLC0415 - see above

    assert issubclass(HTTPError, Exception)
    return HTTPError


def no_access(repo_id: str, endpoint: str, status: int) -> DownloadError:
    """What to do about a repository whose files the hub will not give to this user."""
    return DownloadError(
        f"{repo_id}: {endpoint} refused access (HTTP {status}). The repository is gated or private: accept its terms"
        f" at {endpoint}/{repo_id}, then set HF_TOKEN to an access token of that account (or run `hf auth login`)"
    )


def _raise_refusal(error: HfHubHTTPError, repo_id: str, revision: str | None, endpoint: str) -> NoReturn:
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = error.response.status_code
    if isinstance(error, RevisionNotFoundError):
        raise DownloadError(
            f"{repo_id} has no revision {revision!r} at {endpoint}; name a branch, a tag or a commit of it"
        ) from error
    if isinstance(error, GatedRepoError):
        raise no_access(repo_id, endpoint, status) from error
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        raise RepositoryMissingError(
            f"{endpoint} has no model {repo_id!r} (HTTP {status}); check the spelling, and if it is private set"
            " HF_TOKEN to an access token that may read it"
        ) from error
    if status in (401, 403):
        raise no_access(repo_id, endpoint, status) from error
    raise DownloadError(f"{endpoint} refused to list {repo_id} (HTTP {status}); try again later") from error


def _read_listing(info: ModelInfo, repo_id: str, endpoint: str) -> Listing:
    commit = info.sha
    if not isinstance(commit, str) or not is_commit(commit):
        raise DownloadError(
            f"{endpoint}: the commit of {repo_id} is {printable(str(commit))}, expected 40 hexadecimal digits"
        )
    files: dict[str, RemoteFile] = {}
    for sibling in info.siblings or []:
        if not isinstance(sibling.rfilename, str):
            raise DownloadError(f"{repo_id}: the hub lists a file without a name; this is no listing of a model")
        check_server_file(sibling.rfilename, repo_id)
        if sibling.rfilename in files:
            raise DownloadError(f"{repo_id}: the hub lists {sibling.rfilename!r} twice; expected every file once")
        if is_safe_file(sibling.rfilename):  # others are harmless here but not writable everywhere, and never wanted
            files[sibling.rfilename] = _read_file(sibling, repo_id)
    return Listing(repo_id, commit, files)


def _read_file(sibling: RepoSibling, repo_id: str) -> RemoteFile:
    name, lfs = sibling.rfilename, sibling.lfs
    num_bytes: object = sibling.size if lfs is None else lfs.size
    digest: object = sibling.blob_id if lfs is None else lfs.sha256
    if not isinstance(num_bytes, int) or not 0 <= num_bytes <= MAX_FILE_BYTES:
        raise DownloadError(f"{repo_id}: size of {name!r} is {printable(str(num_bytes))}, expected a count of bytes")
    if not isinstance(digest, str) or not (is_sha1 if lfs is None else is_sha256)(digest):
        expected = "the 40 hexadecimal digits of a git blob" if lfs is None else "the 64 hexadecimal digits of a sha256"
        raise DownloadError(f"{repo_id}: hash of {name!r} is {printable(str(digest))}, expected {expected}")
    return RemoteFile(name, num_bytes, digest, is_lfs=lfs is not None)
