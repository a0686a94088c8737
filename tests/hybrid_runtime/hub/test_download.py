"""What is fetched, what is refused, and what a refusal leaves behind."""

from __future__ import annotations

import errno
import logging
from typing import NamedTuple

import pytest

from hybrid_runtime.errors import BudgetError, CheckpointError, DownloadError, UsageError
from hybrid_runtime.hub import cache as cache_module
from hybrid_runtime.hub import download as download_module
from hybrid_runtime.hub.listing import HubUnreachableError, RepositoryMissingError, RetryPolicy


class Usage(NamedTuple):
    total: int
    used: int
    free: int


CLOSED = "http://127.0.0.1:9"  # the discard port: nothing listens


def test_snapshot_holds_the_needed_files_and_no_code_or_pickle(hub, client):
    files = client.model_files()
    repo = hub.add(client.repo, files)
    snapshot = client.get()
    assert snapshot == client.folder / "snapshots" / repo.commit
    assert sorted(path.name for path in snapshot.iterdir()) == [
        "config.json",
        "generation_config.json",
        client.shard_1,
        client.shard_2,
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
    ]
    assert all(path.read_bytes() == files[path.name] for path in snapshot.iterdir())
    assert all(path.is_symlink() for path in snapshot.iterdir())
    assert (client.folder / "refs" / "main").read_text() == repo.commit
    assert not [hit for hit in hub.hits if hit.file and hit.file.endswith((".py", ".bin"))]


def test_second_call_transfers_nothing(hub, client):
    hub.add(client.repo, client.model_files())
    first = client.get()
    hub.hits.clear()
    assert client.get() == first
    assert [hit.path.split("?")[0] for hit in hub.hits] == [f"/api/models/{client.repo}"]


def test_commit_that_is_cached_needs_no_network(hub, client):
    repo = hub.add(client.repo, client.model_files())
    first = client.get(revision=repo.commit)
    hub.hits.clear()
    assert client.get(revision=repo.commit) == first
    assert hub.hits == []


def test_flipped_bit_is_refused_and_nothing_is_left(hub, client):
    repo = hub.add(client.repo, client.model_files())
    hub.flip_bit.add(client.shard_2)
    with pytest.raises(DownloadError, match=f"{client.shard_2} arrived with sha256 ") as caught:
        client.get()
    message = str(caught.value)
    assert repo.etag(client.shard_2) in message
    assert len([word for word in message.replace(",", "").replace(";", "").split() if len(word) == 64]) == 2
    assert client.partials() == []
    assert client.visible() == []
    assert not (client.folder / "blobs" / repo.etag(client.shard_2)).exists()
    assert (client.folder / "blobs" / repo.etag(client.shard_1)).exists()  # verified, worth keeping


def test_flipped_bit_in_a_small_file_is_found_by_its_git_hash(hub, client):
    hub.add(client.repo, client.model_files())
    hub.flip_bit.add("config.json")
    with pytest.raises(DownloadError, match=r"config\.json arrived with git sha1"):
        client.get()


def test_server_that_offers_another_size_is_refused(hub, client):
    repo = hub.add(client.repo, client.model_files())
    lfs = {"sha256": repo.etag(client.shard_1), "size": 299_999, "pointerSize": 134}
    repo.overrides[client.shard_1] = {"lfs": lfs}
    with pytest.raises(DownloadError, match="offers 300000 bytes where the hub promised 299999"):
        client.get()
    assert client.partials() == []


def test_full_disk_is_refused_before_any_byte(hub, client, monkeypatch):
    hub.add(client.repo, client.model_files())
    monkeypatch.setattr(download_module.shutil, "disk_usage", lambda folder: Usage(10**9, 10**9 - 1234, 1234))
    with pytest.raises(BudgetError, match=r"needs .* \(60\d+ bytes\), and .* \(1234 bytes\)"):
        client.get()
    assert [hit for hit in hub.hits if hit.file] == []
    assert not client.folder.exists()


def test_disk_check_counts_only_what_is_missing(hub, client, monkeypatch):
    hub.add(client.repo, client.model_files())
    hub.drop_after[client.shard_2] = [250_000]
    with pytest.raises(DownloadError):
        client.get(retry=RetryPolicy(attempts=1, first_wait_s=0))
    monkeypatch.setattr(download_module, "free_disk_bytes", lambda folder: 49_999)
    with pytest.raises(BudgetError, match=r"\(50000 bytes\)"):
        client.get()
    monkeypatch.setattr(download_module, "free_disk_bytes", lambda folder: 50_000)
    assert (client.get() / client.shard_2).stat().st_size == 300_000


def test_disk_that_fills_up_on_the_way_is_a_budget_error(hub, client, monkeypatch):
    hub.add(client.repo, client.model_files())

    def no_space(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/blob")

    monkeypatch.setattr(download_module, "fetch_blob", no_space)
    with pytest.raises(BudgetError, match="/cache/blob: the disk is full"):
        client.get()


def test_cache_that_is_a_file_is_explained(hub, client):
    hub.add(client.repo, client.model_files())
    client.cache_dir.write_text("not a folder")
    with pytest.raises(DownloadError, match="the cache must be a folder"):
        client.get()


@pytest.mark.parametrize(
    "name",
    ["../../x.safetensors", "/etc/x.safetensors", "a\\x.safetensors", "C:x.safetensors", "a/../x.json", "a\nb", "a//b"],
)
def test_file_names_that_leave_the_folder_are_refused(hub, client, name):
    repo = hub.add(client.repo, client.model_files())
    repo.extra_siblings.append({"rfilename": name, "size": 1, "blobId": "a" * 40})
    with pytest.raises(DownloadError, match="the hub lists a file named"):
        client.get()
    assert not client.cache_dir.exists()


@pytest.mark.parametrize(
    "override",
    [
        {"lfs": {"sha256": "../../../x", "size": 1, "pointerSize": 1}},
        {"lfs": None, "blobId": "../x"},
        {"lfs": None, "blobId": None},
        {"lfs": {"sha256": "a" * 64, "size": -1, "pointerSize": 1}},
        {"lfs": {"sha256": "a" * 64, "size": 2**60, "pointerSize": 1}},
        {"lfs": {"sha256": "a" * 64, "size": "1", "pointerSize": 1}},
    ],
    ids=["digest-traversal", "blob-traversal", "no-hash", "negative", "huge", "text-size"],
)
def test_listings_that_lie_about_hash_or_size_are_refused(hub, client, override):
    hub.add(client.repo, client.model_files()).overrides[client.shard_1] = override
    with pytest.raises(DownloadError, match=client.shard_1):
        client.get()
    assert not client.cache_dir.exists()


def test_commit_that_is_a_path_is_refused(hub, client):
    hub.add(client.repo, client.model_files(), commit_override="../../../evil")
    with pytest.raises(DownloadError, match="expected 40 hexadecimal digits"):
        client.get()


def test_repository_of_pickles_is_refused_with_a_way_out(hub, client):
    hub.add(client.repo, {"config.json": b"{}", "pytorch_model-00001-of-00002.bin": b"x", "extra.pt": b"x"})
    with pytest.raises(
        CheckpointError, match=r"only as pickles \(extra.pt, pytorch_model-00001.*never loads.*safe_seri"
    ):
        client.get()
    assert [hit for hit in hub.hits if hit.file] == []


def test_missing_shard_is_noticed_before_the_download(hub, client):
    files = client.model_files()
    del files[client.shard_2]
    hub.add(client.repo, files)
    with pytest.raises(CheckpointError, match=client.shard_2):
        client.get()
    assert [hit for hit in hub.hits if hit.file] == []


def test_gated_repository_asks_for_a_token_and_takes_it(hub, client):
    hub.add(client.repo, client.model_files(), gated=True)
    with pytest.raises(DownloadError, match=r"refused access \(HTTP 401\).*HF_TOKEN"):
        client.get()
    snapshot = client.get(token="hf_secret")
    assert (snapshot / client.shard_1).exists()
    assert {hit.token for hit in hub.hits if hit.server == "cdn"} == {None}  # the token stays with the hub
    assert "Bearer hf_secret" in {hit.token for hit in hub.hits if hit.server == "hub"}


@pytest.mark.parametrize("status", [401, 403])
def test_listing_that_is_forbidden_tells_about_the_token(hub, client, status):
    hub.add(client.repo, client.model_files())
    hub.listing_status = [status]
    with pytest.raises(DownloadError, match="HF_TOKEN"):
        client.get()


def test_unknown_repository_and_revision_are_told_apart(hub, client):
    with pytest.raises(RepositoryMissingError, match=r"has no model 'acme/sparse-1b' \(HTTP 404\)"):
        client.get()
    hub.add(client.repo, client.model_files())
    with pytest.raises(DownloadError, match="no revision 'v9'"):
        client.get(revision="v9")


def test_listing_is_retried_while_the_hub_has_trouble(hub, client):
    hub.add(client.repo, client.model_files())
    hub.listing_status = [503, 500]
    assert (client.get() / "config.json").exists()


def test_unreachable_hub_without_a_copy_says_how_to_help_oneself(client):
    with pytest.raises(HubUnreachableError) as caught:
        client.get(endpoint=CLOSED)
    assert f"{CLOSED} cannot be reached" in str(caught.value)
    assert "copy that folder here" in str(caught.value)


def test_unreachable_hub_with_a_copy_uses_it_and_says_so(hub, client, caplog):
    hub.add(client.repo, client.model_files())
    snapshot = client.get()
    with caplog.at_level(logging.WARNING):
        assert client.get(endpoint=CLOSED) == snapshot
    assert f"going on with the cached copy {snapshot}" in caplog.text


@pytest.mark.parametrize("lost", ["config.json", "model-00002-of-00002.safetensors"])
def test_incomplete_copy_does_not_count_as_one(hub, client, lost):
    hub.add(client.repo, client.model_files())
    snapshot = client.get()
    (snapshot / lost).resolve().unlink()  # the link stays and leads nowhere
    with pytest.raises(HubUnreachableError):
        client.get(endpoint=CLOSED)
    assert (client.get() / lost).is_file()


def test_answer_that_is_no_listing_is_not_believed(hub, client):
    repo = hub.add(client.repo, client.model_files())
    repo.extra_siblings.append({"no": "name"})
    with pytest.raises(HubUnreachableError, match="no listing of a model"):
        client.get()


@pytest.mark.parametrize("hard_link", [True, False], ids=["hard-link", "copy"])
def test_without_symbolic_links_files_are_linked_hard_or_copied(hub, client, monkeypatch, hard_link):
    files = client.model_files()
    hub.add(client.repo, files)
    monkeypatch.setenv("HF_HUB_DISABLE_SYMLINKS", "1")
    if not hard_link:

        def refuse(*args: object) -> None:
            raise OSError(errno.EPERM, "no hard links on this disk")

        monkeypatch.setattr(cache_module.os, "link", refuse)
    snapshot = client.get()
    shard = snapshot / client.shard_1
    assert not shard.is_symlink()
    assert shard.read_bytes() == files[client.shard_1]
    assert shard.stat().st_nlink == (2 if hard_link else 1)
    changed_s = shard.stat().st_mtime_ns
    hub.hits.clear()
    assert client.get() == snapshot
    assert shard.stat().st_mtime_ns == changed_s
    assert [hit for hit in hub.hits if hit.file] == []


@pytest.mark.parametrize("allow", [("pytorch_model.bin",), ("modeling_evil.py",), ("../x.gguf",)])
def test_pickles_code_and_paths_cannot_be_asked_for(hub, client, allow):
    hub.add(client.repo, client.model_files())
    with pytest.raises(UsageError):
        client.get(allow=allow)
    assert [hit for hit in hub.hits if hit.file] == []


def test_endpoint_without_a_scheme_is_a_usage_error(client):
    with pytest.raises(UsageError, match=r"HF_ENDPOINT is 'hf-mirror\.com'"):
        client.get(endpoint="hf-mirror.com")
