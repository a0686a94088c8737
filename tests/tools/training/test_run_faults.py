"""Runs that go wrong in the middle: numbers that blow up, Ctrl-C at a bad moment, a reader that leaves."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_tools.training import run as run_module
from hybrid_tools.training.checkpoint import list_states, load_state
from hybrid_tools.training.run_log import read_log

from .tiny_runs import arguments, environment, train, write_corpus_text

CONTINUED = ["--seq-len=32", "--batch-tokens=128", "--held-out=0.1", "--threads=1", "--device=cpu"]
# From the middle of the run on the penalty is more than float32 holds: the gradient of step 6 is no number.
OVERFLOWING = ("--activation=drelu", "--l1=3e38", "--l1-start=0.5", "--l1-end=0.5", "--save-every=2")


def test_after_nan_the_last_checkpoint_can_be_written_out_and_gone_on_from(text, tmp_path, capsys):
    run, again = tmp_path / "run", tmp_path / "again"
    for _ in range(2):  # the same command comes to the same end, and loses nothing on its way
        assert train(text, run, *OVERFLOWING, tokens=10 * 128) == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hybrid-train: ")]
        assert error.startswith("hybrid-train: step 6: the loss is ")
        assert "what was saved before is untouched" in error
        assert [steps for steps, _ in list_states(run / "checkpoints")] == [2, 4]
        assert [line["step"] for line in read_log(run / "log.jsonl") if "loss" in line] == [1, 2, 3, 4, 5]
        assert not (run / "model").exists()
    assert train(text, run, *OVERFLOWING, "--export", "--save-dtype=f32", tokens=10 * 128) == 0
    exported = load_file(run / "model" / "model.safetensors")
    state = load_state(list_states(run / "checkpoints")[-1][1])
    assert exported["model.norm.weight"].equal(state.weights["norm"])
    assert all(weight.isfinite().all() for weight in exported.values())
    assert train(text, again, f"--from={run / 'model'}", "--lr=1e-3", tokens=256, sizes=CONTINUED) == 0
    losses = [line["loss"] for line in read_log(again / "log.jsonl") if "loss" in line]
    assert len(losses) == 2
    assert max(losses) < 5.6  # four steps below ln 300: it did not begin anew


@pytest.mark.parametrize("rate", ["1e3", "1e38"])
def test_model_that_has_blown_up_in_the_last_step_is_one_line_too(rate, text, tmp_path, capsys):
    """No step follows that would notice."""
    options = ("--activation=swiglu", f"--lr={rate}", "--warmup=0")
    code = train(text, tmp_path / "run", *options, tokens=128)
    errors = capsys.readouterr().err
    assert code == 2, errors


def test_interrupted_in_a_test_on_held_out_text_it_saves_the_step_as_it_says(text, tmp_path, monkeypatch, capsys):
    run, mean_losses = tmp_path / "run", run_module.mean_losses

    def press_control_c(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return mean_losses(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "mean_losses", press_control_c)
        assert train(text, run, "--test-every=3", "--save-every=100", tokens=10 * 128) == 130
    assert "interrupted after step 3, which is saved" in capsys.readouterr().err
    assert [steps for steps, _ in list_states(run / "checkpoints")] == [3]


def test_when_nobody_reads_stderr_any_more_it_ends_as_every_program_does(text, tmp_path):
    argv = arguments(text, tmp_path / "run", "--test-every=1", tokens=20 * 128)
    with subprocess.Popen(
        [sys.executable, "-m", "hybrid_tools.train", *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    ) as process:  # fmt: skip
        process.stderr.readline()
        process.stderr.close()
        assert process.wait(timeout=120) == 141


def test_epoch_that_draws_too_few_documents_for_a_step_draws_more(tmp_path, capsys):
    """With a weight below 1 documents are drawn: the first epoch may fill a step where a later does not."""
    few = write_corpus_text(tmp_path / "few.txt", 8)
    assert train(f"{few}@0.3", tmp_path / "run", "--held-out=0", tokens=60 * 128) == 0
    assert train(f"{few}@0.05", tmp_path / "other", "--held-out=0", tokens=60 * 128) == 2
    assert "give more text" in capsys.readouterr().err
    assert not (tmp_path / "other" / "log.jsonl").exists()


def test_output_that_is_a_file_is_not_called_a_full_disk(text, tmp_path, capsys):
    (tmp_path / "run").write_text("years of work")
    assert train(text, tmp_path / "run", tokens=128) == 2
    message = capsys.readouterr().err
    assert str(tmp_path / "run") in message
    assert "make room" not in message


def test_text_that_was_edited_to_the_same_size_cannot_go_on_and_a_copy_can(text, tmp_path, capsys):
    path, run = tmp_path / "words.txt", tmp_path / "run"
    shutil.copy(text, path)
    assert train(path, run, tokens=128) == 0
    path.write_bytes(text.read_bytes())  # another time, the same words
    assert train(path, run, tokens=128) == 0
    path.write_text(text.read_text().replace("cat", "cow"))
    capsys.readouterr()
    assert train(path, run, tokens=128) == 2
    assert f"--text {path}: has changed since {run / 'corpus'} was made of it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run.json", "corpus/index.json", "tokenizer/made_from.json", "model/training.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "{}"], ids=["empty", "cut", "list", "other"])
def test_damaged_file_of_a_run_is_named_and_what_the_message_says_helps(name, content, text, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(text, run, tokens=128) == 0
    model = (run / "model" / "model.safetensors").read_bytes()
    (run / name).write_text(content)
    capsys.readouterr()
    code = train(text, run, tokens=128)
    if name != "model/training.json":  # which is only a copy of what is known anyway
        error = capsys.readouterr().err.splitlines()[-1]
        assert code == 2
        named = re.search(r"remove (\S+),|name another folder", error)
        assert named, error
        if named[1] is None:
            return
        path = run / named[1]
        assert path in ((run / name), (run / name).parent)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        code = train(text, run, tokens=128)
    assert code == 0
    assert (run / "model" / "model.safetensors").read_bytes() == model


def test_folder_is_not_read_as_text(tmp_path, capsys):
    assert train(tmp_path, tmp_path / "run", tokens=128) == 2
    assert f"--text {tmp_path}: is a folder; name its files" in capsys.readouterr().err


def test_half_a_checkpoint_that_a_kill_left_is_cleared_away(text, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step-00000003.safetensors.tmp").write_bytes(b"half")
    assert train(text, run, "--save-every=1", tokens=3 * 128) == 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000002.safetensors",
        "step-00000003.safetensors",
    ]


def test_finished_model_that_lost_a_file_is_written_again(text, tmp_path):
    run = tmp_path / "run"
    assert train(text, run, tokens=128) == 0
    whole = {path.name: path.read_bytes() for path in (run / "model").iterdir()}
    for name in whole:
        (run / "model" / name).unlink()
        assert train(text, run, tokens=128) == 0
        assert {path.name: path.read_bytes() for path in (run / "model").iterdir()} == whole, name
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert train(text, run, tokens=128) == 0
    assert weights.read_bytes() == whole["model.safetensors"]


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "no held-out"])
def test_damaged_tokens_are_named_and_made_again(damage, text, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(text, run, "--save-every=1", tokens=2 * 128) == 0
    tokens = run / "corpus" / "tokens.bin"
    whole = tokens.read_bytes()
    if damage == "missing":
        tokens.unlink()
    elif damage == "no held-out":
        shutil.rmtree(run / "corpus" / "held_out")
    else:
        tokens.write_bytes(whole[:-2] if damage == "cut" else b"")
    capsys.readouterr()
    assert train(text, run, "--save-every=1", tokens=2 * 128) == 2
    assert f"remove {run / 'corpus'}, and the same command makes it again" in capsys.readouterr().err
    shutil.rmtree(run / "corpus")
    assert train(text, run, "--save-every=1", tokens=2 * 128) == 0
    assert tokens.read_bytes() == whole


@pytest.mark.parametrize(
    "line", [b"[]", b'{"a": 1}', b"\xff\xfe", b'{"step": 2'], ids=["list", "other", "bytes", "cut"]
)
def test_damaged_line_of_the_log_is_named_unless_a_kill_left_it_at_the_end(line, text, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(text, run, "--save-every=1", tokens=4 * 128) == 0
    log, notes = run / "log.jsonl", run / "model" / "training.json"
    whole, seconds = log.read_bytes(), json.loads(notes.read_text())["training_seconds"]
    lines = whole.splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:1], line + b"\n", *lines[1:]]))
    notes.unlink()
    capsys.readouterr()
    assert train(text, run, "--save-every=1", tokens=4 * 128) == 2
    assert f"{log}: line 2 is damaged" in capsys.readouterr().err
    log.write_bytes(whole + line)
    assert train(text, run, "--save-every=1", tokens=4 * 128) == 0
    assert json.loads(notes.read_text())["training_seconds"] == seconds


@pytest.mark.parametrize("part", ["weights", "exp_avg"])
@pytest.mark.parametrize("damage", ["lacks", "shape", "more"])
def test_checkpoint_of_other_tensors_is_named_and_the_one_before_goes_on(damage, part, text, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(text, run, "--save-every=1", tokens=2 * 128) == 0
    path = list_states(run / "checkpoints")[-1][1]
    whole, tensors = path.read_bytes(), load_file(path)
    if damage == "lacks":
        del tensors[f"{part}/norm"]
    else:
        tensors[f"{part}/norm" if damage == "shape" else f"{part}/other"] = torch.zeros(3)
    save_file(tensors, path)
    capsys.readouterr()
    assert train(text, run, "--save-every=1", tokens=2 * 128) == 2
    assert re.search(rf"{path}: {part}/(norm|other): found .*, expected .*; remove it", capsys.readouterr().err)
    path.unlink()
    assert train(text, run, "--save-every=1", tokens=2 * 128) == 0
    assert path.read_bytes() == whole


def test_training_json_has_the_command_that_wrote_the_model(text, tmp_path):
    run = tmp_path / "run"
    for options in ((), ("--round-to=q8",), ("--save-dtype=f32",)):
        assert train(text, run, *options, tokens=128) == 0
        command = shlex.split(json.loads((run / "model" / "training.json").read_text())["command"])
        for option in ("--round-to", "--save-dtype"):
            assert (option in command) == any(each.startswith(option) for each in options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--experts=0", "--balance=0.1"), "--balance: a dense model has no experts"),
        (("--l1-start=0.2",), "--l1-start: there is no penalty; give --l1 too"),
        (("--l1-end=0.9",), "--l1-end: there is no penalty; give --l1 too"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, match, text, tmp_path, capsys):
    assert train(text, tmp_path / "run", *options, tokens=128) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
