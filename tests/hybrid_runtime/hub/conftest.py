"""A hub on 127.0.0.1: two real HTTP servers that answer as huggingface.co and its CDN do, and fail on request.

Small files come from the hub itself, LFS files through a redirect to the CDN, a second origin that must never see the
user's token. Every request is logged with its Range header and the number of body bytes that were sent.
"""

from __future__ import annotations

import hashlib
import json
import random
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session

from hybrid_runtime.hub.download import download_snapshot
from hybrid_runtime.hub.listing import RetryPolicy

FAST = RetryPolicy(attempts=5, first_wait_s=0.01, longest_wait_s=0.02, timeout_s=5.0)
REPO = "acme/sparse-1b"

WORKER = """
import sys
from pathlib import Path
from hybrid_runtime.hub.download import download_snapshot
from hybrid_runtime.hub.listing import RetryPolicy
endpoint, repo, cache = sys.argv[1:4]
retry = RetryPolicy(attempts=5, first_wait_s=0.01, longest_wait_s=0.02, timeout_s=20.0)
print(download_snapshot(repo, revision=None, cache_dir=Path(cache), endpoint=endpoint, token=None, allow=None,
                        progress=None, retry=retry))
"""


@dataclass
class Hit:
    """One request that a server has seen."""

    server: str  # "hub" or "cdn"
    method: str
    path: str
    file: str | None
    range: str | None
    token: str | None
    sent_bytes: int = 0


@dataclass
class Repo:
    """The contents of one repository; `overrides` replaces fields of the listing to lie about a file."""

    files: dict[str, bytes]
    lfs: set[str]
    gated: bool = False
    overrides: dict[str, dict[str, object]] = field(default_factory=dict)
    extra_siblings: list[dict[str, object]] = field(default_factory=list)
    commit_override: str | None = None

    @property
    def commit(self) -> str:
        state = repr([(name, hashlib.sha256(data).hexdigest()) for name, data in sorted(self.files.items())])
        return self.commit_override or hashlib.sha1(state.encode()).hexdigest()

    def etag(self, name: str) -> str:
        data = self.files[name]
        if name in self.lfs:
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def listing(self, repo_id: str) -> dict[str, object]:
        siblings = []
        for name, data in self.files.items():
            sibling: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": "ab" * 20}
            if name in self.lfs:
                sibling["lfs"] = {"sha256": self.etag(name), "size": len(data), "pointerSize": 134}
            else:
                sibling["blobId"] = self.etag(name)
            siblings.append(sibling | self.overrides.get(name, {}))
        return {"id": repo_id, "sha": self.commit, "siblings": siblings + self.extra_siblings}


class FakeHub:
    """The hub's state: repositories, and the faults that the next requests will meet."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.hits: list[Hit] = []
        self.drop_after: dict[str, list[int]] = defaultdict(list)  # close the connection after so many body bytes
        self.status: dict[str, list[int]] = defaultdict(list)  # answer with these instead
        self.stall_after: dict[str, list[int]] = defaultdict(list)  # then send nothing until `release`
        self.release = threading.Event()
        self.flip_bit: set[str] = set()
        self.ignore_range = False
        self.listing_status: list[int] = []
        self._servers = [_Server(self, "hub"), _Server(self, "cdn")]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def add(self, repo_id: str, files: dict[str, bytes], **options: object) -> Repo:
        lfs = {name for name in files if name.endswith((".safetensors", ".gguf", ".bin", "tokenizer.model"))}
        self.repos[repo_id] = Repo(files, lfs, **options)
        return self.repos[repo_id]

    def gets(self, file: str) -> list[Hit]:
        """Requests that were answered with this file's contents, in order."""
        return [hit for hit in self.hits if hit.method == "GET" and hit.file == file and hit.sent_bytes]

    def close(self) -> None:
        self.release.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: FakeHub, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.name = hub, name
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed break connections; that is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every small answer waits 40 ms for an ACK
    server: _Server

    def log_message(self, *args: object) -> None:
        """The log is `FakeHub.hits`."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, parts = self.server.hub, unquote(urlsplit(self.path).path).strip("/").split("/")
        self.hit = Hit(
            self.server.name,
            self.command,
            self.path,
            "/".join(parts[4:]) if parts[2:3] == ["resolve"] else None,
            self.headers.get("Range"),
            self.headers.get("Authorization"),
        )
        hub.hits.append(self.hit)
        if parts[:2] == ["api", "models"]:
            self._send_listing("/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else "main")
        elif self.hit.file is not None:
            self._send_file("/".join(parts[:2]), parts[3], self.hit.file)
        else:
            self._send(404)

    def _send_listing(self, repo_id: str, revision: str) -> None:
        hub = self.server.hub
        repo = hub.repos.get(repo_id)
        if hub.listing_status:
            self._send(hub.listing_status.pop(0))
        elif repo is None:
            self._send(404, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", repo.commit):
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            self._send(200, {"Content-Type": "application/json"}, json.dumps(repo.listing(repo_id)).encode())

    def _send_file(self, repo_id: str, revision: str, name: str) -> None:
        hub = self.server.hub
        repo = hub.repos[repo_id]
        if self.server.name == "hub":
            if repo.gated and not self.hit.token:
                self._send(401, {"X-Error-Code": "GatedRepo"})
                return
            if revision != repo.commit or name not in repo.files:
                self._send(404, {"X-Error-Code": "EntryNotFound"})
                return
            if name in repo.lfs:
                linked = {"X-Linked-Etag": f'"{repo.etag(name)}"', "X-Linked-Size": str(len(repo.files[name]))}
                self._send(302, {"Location": hub.cdn + self.path, "X-Repo-Commit": repo.commit, **linked})
                return
        if hub.status[name]:
            self._send(hub.status[name].pop(0))
            return
        data = bytearray(repo.files[name])
        if name in hub.flip_bit:
            data[len(data) // 2] ^= 1
        self._send_range(name, bytes(data), '"cdn-etag"' if name in repo.lfs else f'"{repo.etag(name)}"')

    def _send_range(self, name: str, data: bytes, etag: str) -> None:
        start, status, headers = 0, 200, {"ETag": etag, "Accept-Ranges": "bytes"}
        if self.hit.range and not self.server.hub.ignore_range:
            start = int(self.hit.range.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                self._send(416, {"Content-Range": f"bytes */{len(data)}"})
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(status, headers, data[start:], name)

    def _send(
        self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", name: str | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        hub = self.server.hub
        faults = hub.drop_after[name] if name and hub.drop_after[name] else None
        stalls = hub.stall_after[name] if name and hub.stall_after[name] else None
        limit = faults.pop(0) if faults else stalls.pop(0) if stalls else len(body)
        for at in range(0, min(limit, len(body)), 32768):
            self.wfile.write(body[at : min(at + 32768, limit)])
            self.hit.sent_bytes += min(at + 32768, limit, len(body)) - at
        self.wfile.flush()
        if stalls is not None:
            hub.release.wait(20)
        if limit < len(body):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_WR)


def random_bytes(num_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(num_bytes)


def model_files(*, shard_bytes: int = 300_000, num_shards: int = 2) -> dict[str, bytes]:
    """A sharded safetensors repository with the usual clutter around it."""
    shards = [f"model-{i:05d}-of-{num_shards:05d}.safetensors" for i in range(1, num_shards + 1)]
    index = {"metadata": {}, "weight_map": {f"layer{i}.weight": shard for i, shard in enumerate(shards)}}
    return {
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "README.md": b"# model\n",
        "config.json": b'{"model_type": "llama"}',
        "generation_config.json": b"{}",
        "modeling_evil.py": b"raise SystemExit\n",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "pytorch_model.bin": b"\x80\x04pickle",
        "tokenizer.json": b'{"version": "1.0"}',
        "tokenizer.model": random_bytes(5_000, 99),
        "consolidated.safetensors": random_bytes(1_000, 98),
        **{shard: random_bytes(shard_bytes, i) for i, shard in enumerate(shards)},
    }


SHARD_1 = "model-00001-of-00002.safetensors"
SHARD_2 = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="session", autouse=True)
def direct_client() -> Iterator[None]:
    """One HTTP client for all tests (each costs 90 ms of certificates), made without the machine's proxies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "*")
        close_session()
        yield
        close_session()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the developer's machine reaches a test."""
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HUGGINGFACE_HUB_CACHE", "HF_HUB_DISABLE_SYMLINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    yield hub
    hub.close()


class Client:
    """Calls the downloader with the arguments that a test does not care about."""

    repo = REPO
    shard_1, shard_2 = SHARD_1, SHARD_2
    model_files = staticmethod(model_files)
    random_bytes = staticmethod(random_bytes)

    def __init__(self, hub: FakeHub, cache_dir: Path) -> None:
        self.hub, self.cache_dir = hub, cache_dir

    def get(self, repo_id: str = REPO, **options: object) -> Path:
        arguments: dict[str, object] = {
            "revision": None,
            "cache_dir": self.cache_dir,
            "endpoint": self.hub.endpoint,
            "token": None,
            "allow": None,
            "progress": None,
            "retry": FAST,
        }
        return download_snapshot(repo_id, **{**arguments, **options})

    def start_process(self, repo_id: str = REPO) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WORKER, self.hub.endpoint, repo_id, str(self.cache_dir)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    @property
    def folder(self) -> Path:
        return self.cache_dir / "models--acme--sparse-1b"

    def partials(self) -> list[Path]:
        return sorted(self.cache_dir.rglob("*.incomplete"))

    def partial_sizes(self) -> list[int]:
        """Bytes of each partial file; one that arrives whole between the listing and the look is left out."""
        sizes = []
        for path in self.partials():
            with suppress(FileNotFoundError):
                sizes.append(path.stat().st_size)
        return sizes

    def visible(self) -> list[Path]:
        """Everything that a reader could find below snapshots/."""
        return [path for path in (self.folder / "snapshots").rglob("*") if not path.is_dir()]


@pytest.fixture
def client(hub: FakeHub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "cache")
