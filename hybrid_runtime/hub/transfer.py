"""Brings one file over HTTP into the cache: resumable across processes, verified, and whole or not there at all.

huggingface_hub restarts a killed shard from zero; shards have five gigabytes, so the transfer is our own. Bytes go to
`<hash>.incomplete` at the offset they belong to. A later process hashes what it finds there, asks for the rest with a
Range request, and renames the file only when size and hash are what the hub promised. Contents are named by their
hash, so a file that changed on the server gets another name: old bytes and new ones cannot mix unseen.

Two processes that write the same blob in spite of the lock (some network drives ignore locks) put equal bytes at equal
offsets. This module knows no repository layout and chooses no files.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from hybrid_runtime.errors import DownloadError
from hybrid_runtime.hub.listing import RemoteFile, RetryPolicy, http_error, no_access
from hybrid_runtime.progress import Progress

READ_BYTES = 2**20
# An attempt that brought less counts as failed, so that a line which drops every few bytes ends some day.
FRUITFUL_BYTES = 2**20

_logger = logging.getLogger(__name__)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class Source:
    """Where one file comes from."""

    url: str
    headers: Mapping[str, str]
    repo_id: str
    endpoint: str


class _Answer(Protocol):
    """What is read of an HTTP response, whichever client made it."""

    @property
    def status_code(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def history(self) -> Sequence[_Answer]: ...


class _TryAgainError(Exception):
    """The attempt failed in a way that another one may not."""

    def __init__(self, reason: str, asked_s: float | None = None) -> None:
        super().__init__(reason)
        self.asked_s = asked_s


class _WrongContentsError(DownloadError):
    """The bytes are not what was promised; none of them may be kept."""


class PartialBlob:
    """The bytes of one file that are on disk so far, with their hash."""

    def __init__(self, path: Path, file: RemoteFile, progress: Progress) -> None:
        self.path = path
        self.file = file
        self.position = 0
        self._progress = progress
        self._reported_bytes = 0
        self._hasher = _new_hasher(file)
        # Not append mode: a second writer must overwrite with the same bytes, not add them behind.
        self._stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "rb+")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def adopt(self) -> bool:
        """Hash what an earlier process left; true if there was something to go on from."""
        if os.fstat(self._stream.fileno()).st_size > self.file.num_bytes:
            self.restart()
        while chunk := self._stream.read(READ_BYTES):
            self._count(chunk)
        return self.position > 0

    def restart(self) -> None:
        """Forget all bytes."""
        self._stream.seek(0)
        self._stream.truncate(0)
        self.position = 0
        self._hasher = _new_hasher(self.file)

    def write(self, chunk: bytes) -> None:
        """Add the next bytes, never more than were promised."""
        if self.position + len(chunk) > self.file.num_bytes:
            raise _WrongContentsError(
                f"{self.file.name}: the server sends more than the {self.file.num_bytes} bytes that the hub promised"
            )
        self._stream.write(chunk)
        self._count(chunk)

    def flush(self) -> None:
        """Hand what is buffered to the system, so that a kill cannot lose it."""
        self._stream.flush()

    def sync(self) -> None:
        """Wait until the disk has everything."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def verify(self, source: Source) -> None:
        """Refuse contents that are not what the hub promised."""
        if self.digest() != self.file.digest:
            raise _WrongContentsError(
                f"{source.repo_id}: {self.file.name} arrived with {self.file.hash_name} {self.digest()}, expected"
                f" {self.file.digest}; it was removed. Run again; if this repeats, the server or a proxy alters it"
            )

    def digest(self) -> str:
        """Hash of the bytes so far, in the hub's notation."""
        return self._hasher.hexdigest()

    def _count(self, chunk: bytes) -> None:
        self._hasher.update(chunk)
        self.position += len(chunk)
        if self.position > self._reported_bytes:  # after a restart the display waits, it does not run backwards
            self._progress.advance(self.position - self._reported_bytes)
            self._reported_bytes = self.position


def fetch_blob(file: RemoteFile, source: Source, blob: Path, *, retry: RetryPolicy, progress: Progress) -> None:
    """Bring `file` to `blob`, going on from `<blob>.incomplete`; the caller holds the blob's lock."""
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial_path = incomplete_path(blob)
    try:
        with PartialBlob(partial_path, file, progress) as partial:
            inherited = partial.adopt()
            _receive(partial, source, retry)
            if inherited and partial.digest() != file.digest:  # a power cut can leave garbage in the old part
                partial.restart()
                _receive(partial, source, retry)
            partial.verify(source)
            partial.sync()
    except _WrongContentsError:
        partial_path.unlink(missing_ok=True)
        raise
    partial_path.replace(blob)


def incomplete_path(blob: Path) -> Path:
    """Where the bytes of a blob gather until it is whole."""
    return blob.with_name(f"{blob.name}.incomplete")


def _new_hasher(file: RemoteFile) -> hashlib._Hash:
    if file.is_lfs:
        return hashlib.sha256()
    hasher = hashlib.sha1(usedforsecurity=False)  # git's name for small files; nothing better is published
    hasher.update(b"blob %d\0" % file.num_bytes)
    return hasher


def _receive(partial: PartialBlob, source: Source, retry: RetryPolicy) -> None:
    """Ask again and again for the rest, until it is there or patience ends."""
    failures = 0
    furthest = partial.position
    while partial.position < partial.file.num_bytes:
        asked_s = None
        reason = "the server ended before the file did"
        try:
            _receive_once(partial, source, retry)
        except _TryAgainError as error:
            reason, asked_s = str(error), error.asked_s
        except http_error() as error:
            reason = f"{type(error).__name__}: {error}"
        if partial.position == partial.file.num_bytes:
            return
        partial.flush()
        if partial.position >= furthest + FRUITFUL_BYTES:
            failures = 0
        furthest = max(furthest, partial.position)
        failures += 1
        if failures >= retry.attempts:
            raise DownloadError(
                f"{source.repo_id}: {partial.file.name} stopped at {partial.position} of {partial.file.num_bytes} bytes"
                f" from {source.endpoint} after {failures} attempts ({reason}). What has arrived is kept; run again to"
                " go on from there"
            )
        _logger.warning("%s stopped at %d bytes (%s), trying again", partial.file.name, partial.position, reason)
        retry.wait(failures, asked_s)


def _receive_once(partial: PartialBlob, source: Source, retry: RetryPolicy) -> None:
    from huggingface_hub import get_session  # noqa: PLC0415 - slow to import

    headers = {**source.headers, "Accept-Encoding": "identity"}  # a range of compressed bytes would be useless
    if partial.position:
        headers["Range"] = f"bytes={partial.position}-"
    with get_session().stream(
        "GET", source.url, headers=headers, timeout=retry.timeout_s, follow_redirects=True
    ) as response:
        _check_status(response, partial, source)
        _check_same_file(response, partial.file, source)
        _match_position(response, partial)
        for chunk in response.iter_bytes():
            partial.write(chunk)


def _check_status(answer: _Answer, partial: PartialBlob, source: Source) -> None:
    status = answer.status_code
    if status in (200, 206):
        return
    if status == 416:  # what we have is not a part of what the server has
        partial.restart()
        raise _TryAgainError("HTTP 416: the server has no such range")
    if status in (408, 429) or status >= 500:
        asked = answer.headers.get("Retry-After", "")
        raise _TryAgainError(f"HTTP {status}", float(asked) if asked.isdecimal() else None)
    if status in (401, 403):
        raise no_access(source.repo_id, source.endpoint, status)
    raise DownloadError(
        f"{source.repo_id}: {partial.file.name} could not be fetched from {source.endpoint} (HTTP {status});"
        " the repository may have changed, run again"
    )


def _check_same_file(answer: _Answer, file: RemoteFile, source: Source) -> None:
    """Refuse early when the server now has other contents under this name than it listed."""
    for step in (*answer.history, answer):
        etag = step.headers.get("X-Linked-Etag", "").removeprefix("W/").strip('"')
        if etag and etag != file.digest:
            raise DownloadError(
                f"{source.repo_id}: {file.name} changed on {source.endpoint}: listed with {file.hash_name}"
                f" {file.digest}, now {etag[:80]!r}; run again to fetch the new version"
            )


def _match_position(answer: _Answer, partial: PartialBlob) -> None:
    """Make sure that the next byte of the answer is the next byte of the file."""
    num_bytes = partial.file.num_bytes
    is_plain = answer.headers.get("Content-Encoding", "identity") == "identity"
    if answer.status_code == 206:
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != partial.position or not is_plain:
            partial.restart()
            raise _TryAgainError("the server sent another range than was asked for")
        total = found[3]
    else:
        if partial.position:  # the server ignores Range and sends everything
            partial.restart()
        total = answer.headers.get("Content-Length", "*") if is_plain else "*"
    if total.isdecimal() and int(total) != num_bytes:
        raise _WrongContentsError(
            f"{partial.file.name}: the server offers {total} bytes where the hub promised {num_bytes}; a proxy or a"
            " login page may stand between"
        )
