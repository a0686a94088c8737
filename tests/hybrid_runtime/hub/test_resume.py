"""Interrupted transfers go on where they stopped, across drops, processes and misbehaving servers."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download

from hybrid_runtime.errors import DownloadError
from hybrid_runtime.hub.listing import RetryPolicy


def wait_until(condition, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def test_shard_dropped_twice_arrives_and_the_log_shows_ranges(hub, client):
    files = client.model_files()
    hub.add(client.repo, files)
    hub.drop_after[client.shard_1] = [100_000, 70_000]
    snapshot = client.get()
    assert (snapshot / client.shard_1).read_bytes() == files[client.shard_1]
    hits = hub.gets(client.shard_1)
    assert [hit.range for hit in hits] == [None, "bytes=100000-", "bytes=170000-"]
    assert sum(hit.sent_bytes for hit in hits) == len(files[client.shard_1])  # no byte twice
    assert client.partials() == []


def test_process_killed_mid_download_resumes_in_a_new_process(hub, client):
    files = client.model_files(shard_bytes=3_000_000)
    hub.add(client.repo, files)
    hub.stall_after[client.shard_1] = [2_000_000]
    worker = client.start_process()
    wait_until(lambda: any(size >= 1_900_000 for size in client.partial_sizes()))
    worker.kill()
    assert worker.wait() == -9
    hub.release.set()

    (partial,) = client.partials()
    kept = partial.stat().st_size
    assert 1_900_000 <= kept <= 2_000_000
    assert client.visible() == []  # whoever reads the cache now sees no snapshot at all
    assert not (client.folder / "refs").exists()

    second = client.start_process()
    printed, errors = second.communicate(timeout=30)
    assert second.returncode == 0, errors
    assert hub.gets(client.shard_1)[-1].range == f"bytes={kept}-"
    assert hub.gets(client.shard_1)[-1].sent_bytes == 3_000_000 - kept
    for name in (client.shard_1, client.shard_2, "config.json"):
        assert (Path(printed.strip()) / name).read_bytes() == files[name]
    assert client.partials() == []


def test_server_that_ignores_range_restarts_from_zero_without_mixing(hub, client):
    files = client.model_files()
    hub.add(client.repo, files)
    hub.ignore_range = True
    hub.drop_after[client.shard_1] = [100_000]
    snapshot = client.get()
    assert (snapshot / client.shard_1).read_bytes() == files[client.shard_1]
    assert [hit.range for hit in hub.gets(client.shard_1)] == [None, "bytes=100000-"]
    assert hub.gets(client.shard_1)[1].sent_bytes == len(files[client.shard_1])


def test_new_version_between_runs_does_not_inherit_old_bytes(hub, client):
    old = client.model_files()
    hub.add(client.repo, old)
    hub.drop_after[client.shard_1] = [100_000] * 20
    with pytest.raises(DownloadError, match="run again to go on"):
        client.get(retry=RetryPolicy(attempts=1, first_wait_s=0))
    assert len(client.partials()) == 1

    new = {**old, client.shard_1: client.random_bytes(300_000, 7)}
    hub.add(client.repo, new)
    hub.drop_after.clear()
    hub.hits.clear()
    snapshot = client.get()
    assert (snapshot / client.shard_1).read_bytes() == new[client.shard_1]
    assert [hit.range for hit in hub.gets(client.shard_1)] == [None]


def test_etag_that_changed_after_the_listing_stops_before_a_byte(hub, client):
    repo = hub.add(client.repo, client.model_files())
    repo.overrides[client.shard_1] = {"lfs": {"sha256": "a" * 64, "size": 300_000, "pointerSize": 134}}
    with pytest.raises(DownloadError, match=r"changed on http://127.*listed with sha256 aaaa.*now"):
        client.get()
    assert client.visible() == []
    assert [path.stat().st_size for path in client.partials()] == [0]


def test_garbage_left_by_a_power_cut_is_replaced(hub, client):
    files = client.model_files()
    repo = hub.add(client.repo, files)
    blob = client.folder / "blobs" / repo.etag(client.shard_1)
    blob.parent.mkdir(parents=True)
    blob.with_name(blob.name + ".incomplete").write_bytes(bytes(200_000))
    snapshot = client.get()
    assert (snapshot / client.shard_1).read_bytes() == files[client.shard_1]
    assert [hit.range for hit in hub.gets(client.shard_1)] == ["bytes=200000-", None]


@pytest.mark.parametrize("size", [300_000, 300_001], ids=["whole", "one-byte-too-long"])
def test_leftover_of_full_length_or_more_is_checked_not_trusted(hub, client, size):
    files = client.model_files()
    repo = hub.add(client.repo, files)
    blob = client.folder / "blobs" / repo.etag(client.shard_1)
    blob.parent.mkdir(parents=True)
    blob.with_name(blob.name + ".incomplete").write_bytes((files[client.shard_1] + b"x")[:size])
    snapshot = client.get()
    assert (snapshot / client.shard_1).read_bytes() == files[client.shard_1]
    assert len(hub.gets(client.shard_1)) == (0 if size == 300_000 else 1)


def test_server_errors_and_silence_are_retried_with_a_warning(hub, client, caplog):
    files = client.model_files()
    hub.add(client.repo, files)
    hub.status[client.shard_1] = [503, 429, 408]
    hub.stall_after[client.shard_2] = [50_000]
    with caplog.at_level(logging.WARNING):
        snapshot = client.get(retry=RetryPolicy(attempts=5, first_wait_s=0.01, longest_wait_s=0.02, timeout_s=0.3))
    assert (snapshot / client.shard_2).read_bytes() == files[client.shard_2]
    assert hub.gets(client.shard_2)[-1].range == "bytes=50000-"
    assert "HTTP 503" in caplog.text
    assert "ReadTimeout" in caplog.text


def test_line_that_never_works_gives_up_and_keeps_what_came(hub, client):
    hub.add(client.repo, client.model_files())
    hub.drop_after[client.shard_1] = [60_000, 0, 0, 0, 0, 0, 0, 0]
    with pytest.raises(DownloadError, match=r"stopped at 60000 of 300000 bytes .* after 5 attempts") as caught:
        client.get()
    assert hub.endpoint in str(caught.value)
    assert [path.stat().st_size for path in client.partials()] == [60_000]
    assert client.visible() == []
    hub.drop_after.clear()
    client.get()
    assert hub.gets(client.shard_1)[-1].range == "bytes=60000-"


def test_two_processes_share_one_download(hub, client):
    files = client.model_files(shard_bytes=1_000_000)
    hub.add(client.repo, files)
    hub.stall_after[client.shard_1] = [500_000]
    first = client.start_process()
    wait_until(lambda: hub.gets(client.shard_1))
    second = client.start_process()
    assert second.stderr.readline().startswith(f"waiting for another process that is downloading {client.shard_1}")
    hub.release.set()
    outcomes = [worker.communicate(timeout=60) for worker in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outcomes
    assert outcomes[0][0] == outcomes[1][0]
    for shard in (client.shard_1, client.shard_2):
        assert sum(hit.sent_bytes for hit in hub.gets(shard)) == 1_000_000
        assert (Path(outcomes[0][0].strip()) / shard).read_bytes() == files[shard]


@pytest.mark.parametrize(
    ("failures", "asked_s", "waited_s"), [(1, None, 1), (3, None, 4), (9, None, 30), (1, 7.0, 7), (1, 900.0, 30)]
)
def test_waits_double_and_heed_the_server_within_reason(monkeypatch, failures, asked_s, waited_s):
    waits: list[float] = []
    monkeypatch.setattr("hybrid_runtime.hub.listing.time.sleep", waits.append)
    RetryPolicy().wait(failures, asked_s)
    assert waits == [waited_s]


@pytest.mark.parametrize("bad", [{"attempts": 0}, {"first_wait_s": -1}, {"timeout_s": 0}])
def test_policy_that_makes_no_sense_is_refused(bad):
    with pytest.raises(ValueError, match="must be positive"):
        RetryPolicy(**bad)


def test_huggingface_hub_finds_what_was_downloaded(hub, client):
    files = client.model_files()
    repo = hub.add(client.repo, files)
    client.get()
    path = hf_hub_download(client.repo, client.shard_1, cache_dir=client.cache_dir, local_files_only=True)
    assert repo.commit in path
    assert Path(path).read_bytes() == files[client.shard_1]
