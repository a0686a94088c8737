"""SIGKILL at any moment: never a store with wrong weights, the old one stays, a rerun resumes and ends the same."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from fork_server import ForkServer

from hybrid_runtime.demo import make_demo
from hybrid_runtime.errors import IncompleteStore, StoreError, UsageError
from hybrid_runtime.progress import NoProgress
from hybrid_runtime.store.reader import open_store
from hybrid_runtime.stores import ModelRequest, convert_model

from .synthetic import write_llama

SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "head_dim": 64, "vocab_size": 2000}
NUM_KILLS, KILLS_PER_STORE = 20, 4
POLL_S = 0.0002
RESUME = "its conversion has not finished; run the same hybrid-convert command again to resume it"


@dataclass(frozen=True, slots=True)
class Whole:
    """What an uninterrupted conversion leaves."""

    files: dict[str, str]  # relative path -> sha256
    data: str
    num_bytes: int


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = ForkServer(Path(__file__).with_name("convert_server.py"), tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """One layer and a tokenizer: every kind of change to the disk, few of each."""
    demo = make_demo(tmp_path_factory.mktemp("demo") / "demo")
    folder = write_llama(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=1, vocab_size=256)
    shutil.copy(demo / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """24 MB as bf16; 17 matrices' worth of blocks a layer."""
    return write_llama(tmp_path_factory.mktemp("model") / "llama", **SIZES)


@pytest.fixture(scope="module")
def wholes(server, model, tiny, tmp_path_factory):
    """By (checkpoint, quantisation): an uninterrupted conversion."""
    found = {}
    for path in (model, tiny):
        for quant in ("f32", "bf16"):
            folder = tmp_path_factory.mktemp("whole") / "store"
            assert server.run(path, "-o", folder, "--quant", quant) == 0
            store = open_store(folder)
            found[path, quant] = Whole(digests(folder), store.manifest.data, store.num_bytes)
            shutil.rmtree(folder)
    return found


def digests(folder):
    """Every file below folder with its sha256; directories end in a slash."""
    return {
        str(path.relative_to(folder)) + ("/" if path.is_dir() else ""): ""
        if path.is_dir()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
    }


def journaled_parts(data):
    """Inode and time of each part that the journal names."""
    journal = data / "journal.jsonl"
    names = re.findall(r'"file": "([^"]+)"', journal.read_text()) if journal.is_file() else []
    return {name: ((data / name).stat().st_ino, (data / name).stat().st_mtime_ns) for name in names}


def written_bytes(data):
    """Bytes in the parts, the unfinished one included; a file may be renamed while it is looked at."""
    try:
        return sum(entry.stat().st_size for entry in os.scandir(data) if entry.name.endswith((".bin", ".tmp")))
    except FileNotFoundError:
        return 0


def opened(folder):
    """The store, read twice where the first time its manifest was replaced between two looks."""
    try:
        return open_store(folder)
    except StoreError:
        return open_store(folder)


def require_right_or_incomplete(folder, wholes_by_data):
    """The folder is a store whose every byte is right, or says that it is incomplete and what to do; True: a store."""
    if not (folder / "store.json").exists():
        is_begun = any(folder.glob("data-*/journal.jsonl"))
        assert is_begun or not any(folder.glob("data-*/*"))
        with pytest.raises(IncompleteStore if is_begun else StoreError, match=RESUME if is_begun else "is not a store"):
            open_store(folder)
        return False
    store = open_store(folder)
    expected = wholes_by_data[store.manifest.data].files
    found = digests(folder)
    names = [name for name in expected if name.startswith(store.manifest.data) or name == "store.json"]
    assert {name: found.get(name) for name in names} == {name: expected[name] for name in names}
    store.verify()
    return True


def kill_after(running, data, threshold_bytes, look):
    """Kill once so many bytes are there; look is called all the while. True: it was alive."""
    while running.is_alive:
        look()
        if written_bytes(data) >= threshold_bytes:
            running.kill()
            break
        time.sleep(POLL_S)
    return running.wait() == -signal.SIGKILL


def convert_with_kills(server, argv, folder, whole, by_data, rng, look=lambda: None):
    """Kill and resume KILLS_PER_STORE times, then let it finish. How many kills found the store incomplete."""
    data, num_hits = folder / whole.data, 0
    for _ in range(KILLS_PER_STORE):
        finished = journaled_parts(data)
        present = written_bytes(data)
        threshold = present + rng.uniform(0.02, 0.6) * (whole.num_bytes - present)
        was_alive = kill_after(server.start(*argv), data, threshold, look)
        require_right_or_incomplete(folder, by_data)
        num_hits += was_alive and (data / "journal.jsonl").is_file()
        assert finished.items() <= journaled_parts(data).items() or not (data / "journal.jsonl").exists()
    finished = journaled_parts(data)
    assert server.run(*argv) == 0, server.output.read_text()
    assert ("resuming" in server.output.read_text()) == (0 < len(finished) < 10)
    for name, (inode, mtime_ns) in finished.items():
        status = (data / name).stat()
        assert (status.st_ino, status.st_mtime_ns) == (inode, mtime_ns), f"{name} was written again"
    assert digests(folder) == whole.files
    return num_hits


def test_killed_at_20_random_points_it_resumes_to_the_same_bytes(server, model, wholes, tmp_path):
    rng, num_hits = random.Random(1), 0
    whole = wholes[model, "f32"]
    for store_idx in range(NUM_KILLS // KILLS_PER_STORE):
        folder = tmp_path / f"store-{store_idx}"
        argv = (model, "-o", folder, "--quant", "f32")
        num_hits += convert_with_kills(server, argv, folder, whole, {whole.data: whole}, rng)
        shutil.rmtree(folder)
    print(f"{num_hits} of {NUM_KILLS} kills found a conversion at work")
    assert num_hits >= NUM_KILLS // 2


def test_killed_over_an_older_store_there_is_a_right_store_at_every_moment(server, model, wholes, tmp_path):
    rng, num_hits, num_looks = random.Random(2), 0, 0
    by_data = {wholes[model, quant].data: wholes[model, quant] for quant in ("f32", "bf16")}
    folder = tmp_path / "store"
    assert server.run(model, "-o", folder, "--quant", "bf16") == 0

    def look():
        nonlocal num_looks
        num_looks += 1
        assert opened(folder).manifest.data in by_data

    for quant in ("f32", "bf16", "f32"):
        argv = (model, "-o", folder, "--quant", quant)
        num_hits += convert_with_kills(server, argv, folder, wholes[model, quant], by_data, rng, look)
    print(f"{num_hits} of {3 * KILLS_PER_STORE} kills found a conversion at work, {num_looks} looks")
    assert num_hits >= 3 * KILLS_PER_STORE // 2
    assert num_looks > 100


def never(folder):
    return {"folder": str(folder), "kind": "none"}


@pytest.mark.parametrize("older", [None, "bf16"], ids=["fresh", "over-bf16"])
def test_killed_before_each_change_to_the_disk_it_resumes_to_the_same_bytes(server, tiny, wholes, tmp_path, older):
    whole = wholes[tiny, "f32"]
    by_data = {wholes[tiny, quant].data: wholes[tiny, quant] for quant in ("f32", "bf16")}
    code, at = -signal.SIGKILL, 0
    while code == -signal.SIGKILL:
        at += 1
        folder = prepared(server, tiny, tmp_path / f"store-{at}", older)
        argv = (tiny, "-o", folder, "--quant", "f32")
        code = server.run(*argv, fault={"folder": str(folder), "kind": "kill", "at": at})
        assert require_right_or_incomplete(folder, by_data) or older is None
        finished = journaled_parts(folder / whole.data)
        assert server.run(*argv, fault=never(folder)) == 0, server.output.read_text()
        assert digests(folder) == whole.files, f"after a kill before change {at}"
        statuses = {name: (folder / whole.data / name).stat() for name in finished}
        assert finished == {name: (status.st_ino, status.st_mtime_ns) for name, status in statuses.items()}
        shutil.rmtree(folder)
    assert code == 0
    assert at > (50 if older else 40)  # else the changes were not seen


def test_disk_full_before_each_change_is_one_line_and_a_rerun_ends_the_same(server, tiny, wholes, tmp_path):
    whole = wholes[tiny, "f32"]
    by_data = {wholes[tiny, quant].data: wholes[tiny, quant] for quant in ("f32", "bf16")}
    codes = []
    while codes[-3:] != [0, 0, 0]:  # some failures are forgiven: of removing, of making a folder that is there
        at = len(codes) + 1
        folder = prepared(server, tiny, tmp_path / f"store-{at}", "bf16")
        argv = (tiny, "-o", folder, "--quant", "f32")
        codes.append(server.run(*argv, fault={"folder": str(folder), "kind": "full", "at": at}))
        log = server.output.read_text()
        assert "Traceback" not in log
        assert not list(folder.rglob("*.tmp"))
        if codes[-1] != 0:
            assert codes[-1] == 2
            assert f"cannot be written: {os.strerror(errno.ENOSPC)}; free some disk" in log.splitlines()[-1]
        assert require_right_or_incomplete(folder, by_data)
        assert server.run(*argv, fault=never(folder)) == 0, server.output.read_text()
        assert digests(folder) == whole.files, f"after a full disk before change {at}"
        shutil.rmtree(folder)
    assert codes.count(2) > 35


def prepared(server, model, folder, older):
    """An empty place, or a copy of an older store."""
    if older:
        template = folder.parent / "older"
        if not template.exists():
            assert server.run(model, "-o", template, "--quant", older) == 0
        shutil.copytree(template, folder)
    return folder


def test_a_second_converter_is_refused_and_a_killed_one_leaves_no_lock(server, model, wholes, tmp_path):
    folder = tmp_path / "store"
    argv = (model, "-o", folder, "--quant", "f32")
    running = server.start(*argv)
    while not list(folder.glob("data-*/*.tmp")):
        assert running.is_alive, server.output.read_text()
    running.stop()
    assert not (folder / "store.json").exists()
    request = ModelRequest(str(model), "f32")
    with pytest.raises(UsageError, match=f"{folder}: another conversion is writing here; wait for it, or choose"):
        convert_model(request, folder, tmp_path / "cache", NoProgress())
    running.kill()
    assert running.wait() == -signal.SIGKILL
    convert_model(request, folder, tmp_path / "cache", NoProgress())
    assert digests(folder) == wholes[model, "f32"].files
