"""SIGKILL, a full disk and Ctrl-C at any moment of a profile: the same command again ends with the same bits.

Every change to the disk below the profile's folder is a moment of its own; so are three random ones.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from fork_server import ForkServer

from hybrid_runtime.errors import CheckpointError
from hybrid_runtime.profiling.run import STATE, WORK
from hybrid_runtime.profiling.samples import FILE_HEADER_BYTES
from hybrid_runtime.tensor_files import read_metadata
from hybrid_tools.convert import main as convert
from hybrid_tools.profile import main
from tests.hybrid_runtime.small_models import LLAMA, TURBOSPARSE, write_model

DENSE = LLAMA | {"architectures": ["BambooForCausalLM"], "model_type": "bamboo", "hidden_act": "relu"}
TEXT = "Hello world, once upon a time there was a neuron and the others and a layer. "
WINDOW = 16
# 3 windows, of which the second is held out; of 32 tokens 7 are sampled, so that later ones take earlier ones' places
OPTIONS = ("--window", WINDOW, "--tokens", 2 * WINDOW, "--samples", FILE_HEADER_BYTES + 600, "--threads", 1)
LONG = ("--window", WINDOW, "--tokens", 60 * WINDOW, "--samples", 2 * FILE_HEADER_BYTES + 1200, "--threads", 1)
LOCK = ".lock"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = ForkServer(Path(__file__).with_name("profile_server.py"), tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def make_store(folder, config):
    assert convert([str(write_model(folder / "checkpoint", config)), "-o", str(folder / "store")]) == 0
    (folder / "text").write_text("".join(f"{idx} {TEXT}" for idx in range(60)))
    return folder / "store"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("dense"), DENSE | {"num_hidden_layers": 1})


def argv(store, folder, *options):
    return [store, "--text", store.parent / "text", "-o", folder, *(options or OPTIONS)]


@pytest.fixture(scope="module")
def whole(server, store, tmp_path_factory):
    """What an uninterrupted run leaves."""
    folder = tmp_path_factory.mktemp("whole") / "profile"
    assert server.run(*argv(store, folder)) == 0, server.lines
    files = files_of(folder)
    assert len(files) == 3  # profile.json, counts, and the only layer's sample
    assert 3 <= json.loads(files["profile.json"])["num_samples"] <= 10
    return files


def files_of(folder):
    """Everything that is there, by its path in the folder."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found.pop(LOCK, None)
    return found


def disk_of(folder):
    """All that a run could find: folders too, and who may read what."""
    paths = sorted(folder.rglob("*"))
    return folder.exists(), [
        (path, path.stat().st_mode, path.read_bytes() if path.is_file() else b"") for path in paths
    ]


def unharmed(folder):
    """Changes below the folder are counted, which spares the syncs."""
    return {"folder": str(folder), "kind": "none"}


def test_killed_before_each_change_to_the_disk_it_resumes_to_the_same_bytes(server, store, whole, tmp_path):
    code, at, left = -signal.SIGKILL, 0, []
    while code == -signal.SIGKILL:
        at += 1
        folder = tmp_path / "profile"
        code = server.run(*argv(store, folder), fault={"folder": str(folder), "kind": "kill", "at": at})
        assert code in (0, -signal.SIGKILL), server.lines
        left.append(disk_of(folder))
        if left[-1] not in left[:-1]:  # a sync leaves what was there, and from the same disk a run goes on the same
            assert server.run(*argv(store, folder), fault=unharmed(folder)) == 0, (at, server.lines)
            assert files_of(folder) == whole, f"after a kill before change {at}"
        shutil.rmtree(folder, ignore_errors=True)
    assert at > 30  # else the changes were not seen
    assert len({str(disk) for disk in left}) > 20


def test_disk_full_at_any_change_is_one_line_and_a_rerun_ends_the_same(server, store, whole, tmp_path):
    """Of the changes every third, from a random one on."""
    first = int.from_bytes(os.urandom(1), "little") % 3 + 1
    print(f"every third change from {first}")  # shown when the test fails
    codes = []
    while codes[-4:] != [0, 0, 0, 0]:  # what cannot be removed is left, and no reason to fail
        folder, at = tmp_path / f"profile-{len(codes)}", first + 3 * len(codes)
        codes.append(server.run(*argv(store, folder), fault={"folder": str(folder), "kind": "full", "at": at}))
        lines = server.lines
        assert not any("Traceback" in line or "Exception" in line for line in lines), lines
        if codes[-1] != 0:
            assert codes[-1] == 2, lines
            assert [line.startswith("hybrid-profile: ") for line in lines].count(True) == 1
            assert os.strerror(errno.ENOSPC) in lines[-1]
            assert str(folder) in lines[-1]
        assert server.run(*argv(store, folder), fault=unharmed(folder)) == 0, server.lines
        assert files_of(folder) == whole, f"after a full disk before change {at}"
        shutil.rmtree(folder)
    assert codes.count(2) >= 8


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
def test_ended_at_three_random_moments_it_ends_with_the_same_bytes(ending, server, tmp_path):
    """A mixture, whose experts are counted one after another."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"random moments of seed {seed}")  # shown when the test fails
    moments = random.Random(seed)
    store, whole, ended = make_store(tmp_path, TURBOSPARSE), tmp_path / "whole", tmp_path / "ended"
    assert server.run(*argv(store, whole, *LONG), fault=unharmed(whole)) == 0, server.lines
    for after in sorted(moments.sample(range(1, 40), 3)):
        before = windows_of(ended)  # the last run may have come further than asked: this one has to begin its work
        running = server.start(*argv(store, ended, *LONG), fault=unharmed(ended))
        least = max(after, before + 1)
        running.wait_for(lambda least=least: windows_of(ended) >= least)
        time.sleep(moments.uniform(0.0, 0.01))
        signal.pidfd_send_signal(running.pidfd, ending)
        code = running.wait()
        if ending == signal.SIGINT:
            assert code == 130, server.lines
            assert "what was counted is kept; the same command goes on from there" in server.lines
        else:
            assert code == -ending, "it was done before it was ended"
    done = windows_of(ended)
    assert done >= 1
    assert server.run(*argv(store, ended, *LONG), fault=unharmed(ended)) == 0, server.lines
    assert files_of(ended) == files_of(whole)


def windows_of(folder):
    """How many windows the saved state has; 0: there is none (yet)."""
    try:
        return json.loads(read_metadata(folder / WORK / STATE, "")["run"])["windows"]
    except CheckpointError:
        return 0


def test_a_run_that_was_stopped_keeps_others_out_and_a_killed_one_does_not(server, store, whole, tmp_path, capsys):
    """The lock is the process's: SIGSTOP leaves it held, SIGKILL gives it back."""
    folder = tmp_path / "profile"
    running = server.start(*argv(store, folder, *LONG), fault=unharmed(folder))
    running.wait_for(lambda: windows_of(folder) >= 2)
    running.stop()
    assert main([str(each) for each in argv(store, folder)]) == 2
    assert f"{folder}: another run writes its profile here; wait for it" in capsys.readouterr().err
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert main([str(each) for each in argv(store, folder)]) == 2  # the lock is free: what differs is said
    assert "unfinished profile of another text, another --tokens" in capsys.readouterr().err
    assert server.run(*argv(store, folder), "--restart", fault=unharmed(folder)) == 0, server.lines
    assert files_of(folder) == whole


def test_a_run_killed_at_its_very_end_does_not_keep_others_out(server, store, whole, tmp_path):
    """The profile is there, its work too: that is nobody's any more."""
    folder, kept = tmp_path / "profile", tmp_path / "kept"
    assert (
        server.run(*argv(store, folder), fault={"folder": str(folder / "profile.json"), "kind": "full", "at": 2}) == 2
    )
    shutil.copytree(folder / WORK, kept)
    assert server.run(*argv(store, folder), fault=unharmed(folder)) == 0, server.lines
    shutil.copytree(kept, folder / WORK)
    other = (*OPTIONS[:3], WINDOW, *OPTIONS[4:])
    assert server.run(*argv(store, folder, *other), fault=unharmed(folder)) == 0, server.lines
    assert server.run(*argv(store, folder), fault=unharmed(folder)) == 0, server.lines
    assert files_of(folder) == whole
