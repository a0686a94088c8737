"""SIGKILL and a full disk at any moment of a run: the last whole checkpoint stays, and a rerun ends with the same bits.

Every change to the disk below checkpoints/ and model/ is a moment of its own; so are three random ones.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from fork_server import ForkServer

from hybrid_tools.training.checkpoint import list_states, load_state
from hybrid_tools.training.run_log import read_log

from .tiny_runs import arguments, train

NUM_STEPS = 3  # the third checkpoint is the first that removes one
OPTIONS = ("--activation=drelu", "--l1=0.01", "--save-every=1", "--test-every=2")
MODEL = ("model.safetensors", "config.json", "training.json", "tokenizer.model", "tokenizer_config.json")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = ForkServer(Path(__file__).with_name("train_server.py"), tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def argv(text):
    """Of a run in any folder."""

    def of(run, *options, num_steps=NUM_STEPS):
        return arguments(text, run, *(options or OPTIONS), tokens=num_steps * 128)

    return of


@pytest.fixture(scope="module")
def prepared(server, argv, tmp_path_factory):
    """A run killed before its first checkpoint: copies of it begin with the first step."""
    run = tmp_path_factory.mktemp("prepared") / "run"
    fault = {"folder": str(run / "checkpoints"), "kind": "kill", "at": 1}
    assert server.run(*argv(run), fault=fault) == -signal.SIGKILL
    assert (run / "run.json").is_file()
    assert list_states(run / "checkpoints") == []
    return run


@pytest.fixture(scope="module")
def whole(server, argv, tmp_path_factory):
    """What an uninterrupted run leaves."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert server.run(*argv(run)) == 0, server.lines
    return result_of(run)


def curve_of(run):
    """The log without what depends on the clock."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_log(run / "log.jsonl")]


def result_of(run):
    """Everything that must be the same, by name; training.json has times and the command's folder in it.

    Of the checkpoints the newest two: a kill before the removal of the third leaves it behind.
    """
    files = {path.name: path.read_bytes() for _, path in list_states(run / "checkpoints")[-2:]}
    files |= {name: (run / "model" / name).read_bytes() for name in MODEL if name != "training.json"}
    assert (run / "model" / "training.json").is_file()
    return files | {"log": curve_of(run)}


def require_only_whole_states(run, num_steps_before):
    """Every file that counts as a checkpoint can be read; none is lost that was there."""
    found = list_states(run / "checkpoints")
    assert all(load_state(path).num_steps == steps for steps, path in found)
    assert not num_steps_before or (found and found[-1][0] >= num_steps_before)
    return found[-1][0] if found else 0


def never(folder):
    return {"folder": str(folder), "kind": "none"}


@pytest.mark.parametrize(("folder", "fewest"), [("checkpoints", 18), ("model", 10)])
def test_killed_before_each_change_to_the_disk_it_resumes_to_the_same_bits(
    folder, fewest, server, argv, prepared, whole, tmp_path
):
    code, at, newest = -signal.SIGKILL, 0, 0
    while code == -signal.SIGKILL:
        at += 1
        run = shutil.copytree(prepared, tmp_path / f"run-{at}")
        code = server.run(*argv(run), fault={"folder": str(run / folder), "kind": "kill", "at": at})
        newest = require_only_whole_states(run, newest if folder == "checkpoints" else NUM_STEPS)
        steps = [line["step"] for line in curve_of(run) if "loss" in line]
        assert steps == list(range(1, len(steps) + 1))
        assert server.run(*argv(run), fault=never(run)) == 0, (at, server.lines)
        assert result_of(run) == whole, f"after a kill before change {at}"
        shutil.rmtree(run)
    assert code == 0, server.lines
    assert at > fewest  # else the changes were not seen


@pytest.mark.parametrize(("folder", "fewest"), [("checkpoints", 15), ("model", 8)])
def test_disk_full_before_each_change_is_one_line_and_a_rerun_ends_the_same(
    folder, fewest, server, argv, prepared, whole, tmp_path
):
    codes = []
    while codes[-2:] != [0, 0]:
        run = shutil.copytree(prepared, tmp_path / f"run-{len(codes)}")
        codes.append(server.run(*argv(run), fault={"folder": str(run / folder), "kind": "full", "at": len(codes) + 1}))
        lines = server.lines
        assert not any("Traceback" in line for line in lines), lines
        if codes[-1] != 0:
            assert codes[-1] == 2, lines
            assert [line.startswith("hybrid-train: ") for line in lines].count(True) == 1
            assert os.strerror(errno.ENOSPC) in lines[-1]
            assert str(run) in lines[-1]
        assert not list(run.rglob("*.safetensors.tmp"))
        require_only_whole_states(run, 0 if folder == "checkpoints" else NUM_STEPS)
        assert server.run(*argv(run), fault=never(run)) == 0, server.lines
        assert result_of(run) == whole, f"after a full disk before change {len(codes)}"
        shutil.rmtree(run)
    assert codes.count(2) >= fewest


def test_killed_at_three_random_moments_it_ends_with_the_same_bits(server, argv, tmp_path):
    """Some of the moments fall into the writing of a checkpoint: there is one after every other step."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"random moments of seed {seed}")  # shown when the test fails
    moments = random.Random(seed)
    options, num_steps = ("--activation=swiglu", "--save-every=2", "--test-every=9"), 60
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert server.run(*argv(whole, *options, num_steps=num_steps)) == 0, server.lines
    for after in sorted(moments.sample(range(2, num_steps - 10), 3)):
        worker = server.start(*argv(killed, *options, num_steps=num_steps))
        worker.wait_for(lambda after=after: len([line for line in curve_of(killed) if "loss" in line]) >= after)
        time.sleep(moments.uniform(0.0, 0.02))
        worker.kill()
        assert worker.wait() == -signal.SIGKILL, "it was done before it was killed"
    assert server.run(*argv(killed, *options, num_steps=num_steps)) == 0, server.lines
    assert f"of {num_steps}" in " ".join(line for line in server.lines if line.startswith("going on after step"))
    assert result_of(killed) == result_of(whole)


def test_a_run_that_was_stopped_keeps_others_out_and_a_killed_one_does_not(server, argv, text, tmp_path, capsys):
    """The lock is the process's: SIGSTOP leaves it held, SIGKILL gives it back."""
    run = tmp_path / "run"
    worker = server.start(*argv(run, "--activation=drelu", num_steps=500))
    worker.wait_for(lambda: len(curve_of(run)) >= 2)
    worker.stop()
    assert train(text, run, "--activation=drelu", tokens=500 * 128) == 2
    assert "another process is training here; wait for it" in capsys.readouterr().err
    worker.kill()
    assert worker.wait() == -signal.SIGKILL
    assert train(text, run, "--activation=drelu", tokens=128) == 2  # the lock is free: what differs is said
    assert "optimisation.total_tokens: 64000, now 128" in capsys.readouterr().err
