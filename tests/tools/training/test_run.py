"""Whole runs of hybrid-train: killed, resumed, relufied, misled."""

import gzip
import json
import resource
import shutil
import signal
import subprocess
import sys
import time

import filelock
import pytest
import torch
from real.data import shared_data
from safetensors.torch import load_file

from hybrid_runtime.checkpoints.open import open_checkpoint
from hybrid_runtime.demo import make_demo
from hybrid_runtime.text.load import load_tokenizer
from hybrid_tools.training.checkpoint import list_states, load_state, save_state
from hybrid_tools.training.run_log import read_log

from .tiny_runs import SIZES, arguments, environment, start, train, write_corpus_text

NUM_STEPS = 60
CONTINUED = ["--seq-len=32", "--batch-tokens=128", "--held-out=0.1", "--threads=1", "--device=cpu"]


def state_files(run):
    return {path.name: path.read_bytes() for _, path in list_states(run / "checkpoints")}


def loss_curve(run):
    """Every line of the log without what depends on the clock."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_log(run / "log.jsonl")]


def error_of(capsys):
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("hybrid-train:")]
    assert len(errors) == 1, lines
    assert lines[-1] == errors[0]
    return errors[0]


def test_finished_run_is_opened_and_not_trained_again(finished_swiglu, text, capsys):
    before = loss_curve(finished_swiglu)
    options = ("--activation=swiglu", "--save-dtype=f32", "--save-every=5", "--test-every=10")
    assert train(text, finished_swiglu, *options) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{finished_swiglu / 'model'}\n"
    assert loss_curve(finished_swiglu) == before


def test_it_learns_and_says_so_in_the_log(finished_swiglu):
    lines = loss_curve(finished_swiglu)
    losses = [line["loss"] for line in lines if "loss" in line]
    tests = [line["held_out"]["all"] for line in lines if "held_out" in line]
    assert len(losses) == 20
    assert losses[0] == pytest.approx(5.7, abs=0.1)  # ln 300
    assert losses[-1] < 5.2
    assert len(tests) == 2
    assert tests[1] < tests[0]
    notes = json.loads((finished_swiglu / "model" / "training.json").read_text())
    assert notes["held_out_losses"]["all"] == pytest.approx(tests[-1], rel=0.05)
    assert (finished_swiglu / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (("--lr=1e-3",), "optimisation.learning_rate: 0.002, now 0.001"),
        (("--seed=2",), "seed: 1, now 2"),
        (("--activation=drelu",), "config.activation.kind: 'silu_glu', now 'drelu'"),
        (("--layers=3",), "config.num_hidden_layers: 2, now 3"),
        (("--held-out=0.2",), "was made from"),
    ],
    ids=["lr", "seed", "activation", "layers", "held-out"],
)
def test_another_recipe_cannot_go_on(options, difference, finished_swiglu, text, capsys):
    before = state_files(finished_swiglu)
    assert train(text, finished_swiglu, "--activation=swiglu", "--save-dtype=f32", *options) == 2
    assert difference in error_of(capsys)
    assert state_files(finished_swiglu) == before


@pytest.mark.parametrize("other", ["--vocab-size=310", "--tokenizer"], ids=["size", "another"])
def test_another_vocabulary_cannot_go_on(other, finished_swiglu, text, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(text, run, tokens=128) == 0
    sizes = SIZES
    if other == "--tokenizer":
        other = f"--tokenizer={finished_swiglu / 'tokenizer'}"
        sizes = [each for each in SIZES if not each.startswith("--vocab-size")]
    assert train(text, run, other, tokens=128, sizes=sizes) == 2
    assert "was made from" in error_of(capsys)


def test_opening_a_finished_source_again_does_not_lock_out_what_continues_it(text, tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    assert train(text, source, "--activation=swiglu", tokens=256) == 0
    options = (f"--from={source / 'model'}", "--relufy=drelu", "--save-every=1")
    assert train(text, run, *options, tokens=256, sizes=CONTINUED) == 0
    times = {path: path.stat().st_mtime_ns for path in (source / "model").iterdir()}
    assert train(text, source, "--activation=swiglu", tokens=256) == 0
    assert {path: path.stat().st_mtime_ns for path in (source / "model").iterdir()} == times
    moved = shutil.copytree(source / "model", tmp_path / "moved")
    assert train(text, run, f"--from={moved}", *options[1:], tokens=256, sizes=CONTINUED) == 0


@pytest.mark.parametrize("moment", ["tokenizer.tmp", "corpus.tmp"])
def test_killed_while_text_is_prepared_it_ends_the_same(moment, finished_swiglu, text, tmp_path):
    run = tmp_path / "run"
    options = ("--activation=swiglu", "--save-dtype=f32", "--save-every=5", "--test-every=10")
    worker = start(text, run, *options)
    while worker.poll() is None and not (run / moment).exists():
        time.sleep(0.0005)
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    assert train(text, run, *options) == 0
    assert loss_curve(run) == loss_curve(finished_swiglu)
    for name in ("model.safetensors", "config.json", "tokenizer.model"):
        assert (run / "model" / name).read_bytes() == (finished_swiglu / "model" / name).read_bytes()
    held_out = [
        sorted(path.name for path in (each / "corpus" / "held_out").iterdir()) for each in (run, finished_swiglu)
    ]
    assert held_out[0] == held_out[1]


def test_interrupted_it_ends_the_step_saves_it_and_goes_on_to_the_same_bits(text, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = ("--activation=drelu", "--save-every=1000", "--test-every=1000")
    assert train(text, whole, *options, tokens=NUM_STEPS * 128) == 0
    worker = start(text, stopped, *options, tokens=NUM_STEPS * 128)
    while worker.poll() is None and len(loss_curve(stopped)) < 3:
        time.sleep(0.005)
    worker.send_signal(signal.SIGINT)
    _, errors = worker.communicate(timeout=60)
    assert worker.returncode == 130, errors
    (found,) = list_states(stopped / "checkpoints")
    assert f"interrupted after step {found[0]}, which is saved" in errors
    assert train(text, stopped, *options, tokens=NUM_STEPS * 128) == 0
    assert loss_curve(stopped) == loss_curve(whole)
    assert (
        state_files(stopped)[f"step-{NUM_STEPS:08d}.safetensors"]
        == state_files(whole)[f"step-{NUM_STEPS:08d}.safetensors"]
    )


def test_text_of_one_document_is_trained_on_and_the_lack_of_a_test_is_said(tmp_path, capsys):
    words = write_corpus_text(tmp_path / "words.txt").read_text().replace("<|endoftext|>", "")
    (tmp_path / "one.txt").write_text(words)
    assert train(tmp_path / "one.txt", tmp_path / "run", tokens=256) == 0
    assert "NOTHING is held out" in capsys.readouterr().err


@pytest.mark.parametrize("late", [b"caf\xe9", None], ids=["latin-1", "cut-gzip"])
def test_bad_text_that_is_found_late_is_named_as_such(late, text, tmp_path, capsys):
    data = text.read_bytes() + b"\n<|endoftext|>\n" + (late or b"end")
    path = tmp_path / ("late.txt" if late else "late.txt.gz")
    path.write_bytes(data if late else gzip.compress(data)[:-9])
    assert train(path, tmp_path / "run") == 2
    assert error_of(capsys).startswith(f"hybrid-train: --text {path}: is not")


def test_another_text_cannot_go_on(finished_swiglu, tmp_path, capsys):
    other = write_corpus_text(tmp_path / "words.txt", seed=2)
    assert train(other, finished_swiglu, "--activation=swiglu", "--save-dtype=f32") == 2
    assert "name another folder" in error_of(capsys)


def test_two_processes_cannot_train_in_one_folder(text, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with filelock.FileLock(tmp_path / "run" / ".lock"):
        assert train(text, tmp_path / "run") == 2
    assert "another process is training here" in error_of(capsys)


@pytest.mark.parametrize("kind", ["relu", "drelu"])
def test_relufication_starts_from_the_sources_weights_with_another_activation(kind, finished_swiglu, text, tmp_path):
    run, source = tmp_path / "run", finished_swiglu / "model"
    options = (f"--from={source}", f"--relufy={kind}", "--lr=1e-12", "--weight-decay=0", "--save-dtype=f32")
    assert train(text, run, *options, tokens=128, sizes=CONTINUED) == 0
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["model_type"] == {"relu": "mixtral", "drelu": "turbosparsemixtral"}[kind]
    assert config["hidden_act"] == "relu"
    before, after = (load_file(folder / "model.safetensors") for folder in (source, run / "model"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.allclose(weight, after[name], atol=1e-9), name
    tokens = [load_tokenizer(folder).encode("the cat saw Lily") for folder in (source, run / "model")]
    assert tokens[0] == tokens[1]
    lines = loss_curve(run)
    assert lines[0]["zeros"] > 0.4


def test_predictors_of_the_source_are_left_behind(text, tmp_path):
    demo = make_demo(tmp_path / "demo")
    assert any(".predictor." in name for name in open_checkpoint(demo).tensors)
    assert train(text, tmp_path / "run", f"--from={demo}", tokens=256, sizes=CONTINUED) == 0
    made = open_checkpoint(tmp_path / "run" / "model")
    assert not any(".predictor." in name for name in made.tensors)
    assert made.config.activation.kind == "drelu"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--relufy=drelu",), "--relufy drelu: needs --from"),
        (("--from={model}",), "--vocab-size is of a new model; --from has its own"),
        (("--tokenizer={model}",), "--vocab-size: the vocabulary of --tokenizer has its own size"),
        (("--experts=0", "--experts-per-token=2"), "a dense model has no experts"),
        (("--micro-batch=0",), "--micro-batch 0: expected at least 1"),
        (("--context=16",), "--seq-len 32 is more than the model's 16 positions"),
        (("--from={model}", "--activation=drelu"), "--activation is of a new model"),
        (("--text=/nowhere",), "--text /nowhere: no such file"),
        (("--vocab-size=100",), "--vocab-size 100: expected at least 260"),
        (("--vocab-size=265",), "the text's characters and all bytes are"),
        (("--vocab-size=5000",), "the text supports at most"),
        (("--batch-tokens=100",), "--batch-tokens 100 is not a multiple of --seq-len 32"),
        (("--micro-batch=3",), "--micro-batch 3 does not divide the 4 sequences"),
        (("--lr=-1",), "--lr -1.0: expected a number above 0"),
        (("--lr=nan",), "--lr nan: expected a number above 0"),
        (("--warmup=2",), "--warmup 2.0: expected a share from 0 to 1"),
        (("--l1=0.1", "--l1-start=0.5", "--l1-end=0.2"), "--l1-start 0.5 is after --l1-end 0.2"),
        (("--activation=fatrelu",), "needs --fatrelu-threshold above 0"),
        (("--activation=relu", "--fatrelu-threshold=0.1"), "--activation relu has no threshold"),
        (("--hidden-size=30",), "--hidden-size 30 is not an even multiple of --heads 4"),
        (("--kv-heads=3",), "--heads 4 is not a multiple of --kv-heads 3"),
        (("--experts-per-token=5",), "--experts-per-token 5: expected 1 to 4"),
        (("--held-out=1.0",), "--held-out 1.0: expected a share"),
        (("--batch-tokens=999936",), "give more text, or less --batch-tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options_are_refused_by_name(options, match, finished_swiglu, text, tmp_path, capsys):
    options = [each.format(model=finished_swiglu / "model") for each in options]
    assert train(text, tmp_path / "run", *options) == 2
    assert match in error_of(capsys)
    assert not (tmp_path / "run" / "checkpoints").exists()
    if (tmp_path / "run").exists() and "vocab" not in options[0]:  # and obeying helps, in the same folder
        assert train(text, tmp_path / "run", tokens=128) == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--from=/nowhere",), "/nowhere: no such file or folder"),
        (("--tokenizer=/nowhere",), "--tokenizer /nowhere: no such file or folder"),
        (("--from={model}", "--fatrelu-threshold=0.1"), "--fatrelu-threshold: needs --relufy fatrelu"),
        (("--from={model}", "--relufy=fatrelu"), "needs --fatrelu-threshold above 0"),
        (("--from={model}", "--seq-len=128", "--batch-tokens=128"), "--seq-len 128 is more than the model's 64"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options_beside_a_model_are_refused_by_name(options, match, finished_swiglu, text, tmp_path, capsys):
    options = [each.format(model=finished_swiglu / "model") for each in options]
    assert train(text, tmp_path / "run", *options, sizes=CONTINUED) == 2
    assert match in error_of(capsys)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_tokens_that_are_no_number_are_refused(text, tmp_path, capsys):
    assert train(text, tmp_path / "run", tokens="1.5") == 2
    assert "'1.5' is not a whole number of tokens" in error_of(capsys)


@pytest.mark.parametrize("content", ["", "<|endoftext|>\n \n<|endoftext|>"], ids=["no-bytes", "no-words"])
def test_empty_corpus_is_refused_before_a_folder_is_made(content, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(content)
    assert train(tmp_path / "empty.txt", tmp_path / "run") == 2
    assert f"--text {tmp_path / 'empty.txt'}: holds no document to train on" in error_of(capsys)
    assert not (tmp_path / "run").exists()


def test_disk_that_fills_during_a_checkpoint_leaves_the_last_one_whole(text, tmp_path):
    """The second checkpoint does not fit: the file system refuses to let a file grow that far."""
    run = tmp_path / "run"
    options = ("--save-every=5", "--test-every=1000")
    assert train(text, run, *options, "--activation=swiglu", tokens=10 * 128) == 0
    good = state_files(run)
    (size,) = {len(data) for data in good.values()}
    (run / "run.json").unlink()  # the same run, longer: another schedule, so another recipe

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, size - 1000))

    argv = arguments(text, run, *options, "--activation=swiglu", tokens=20 * 128)
    failed = subprocess.run(
        [sys.executable, "-m", "hybrid_tools.train", *argv],
        capture_output=True, text=True, preexec_fn=limit, env=environment(), timeout=120, check=False,
    )  # fmt: skip
    assert failed.returncode == 2, failed.stderr
    line = failed.stderr.splitlines()[-1]
    assert "step-00000015.safetensors: could not be written" in line
    assert "what was saved before is untouched" in line
    assert state_files(run) == good
    assert list((run / "checkpoints").glob("*.tmp")) == []
    assert train(text, run, *options, "--activation=swiglu", tokens=20 * 128) == 0  # with room again it goes on
    assert [steps for steps, _ in list_states(run / "checkpoints")] == [15, 20]


@pytest.mark.parametrize("num_bytes", [2000, 9000], ids=["tokenizer", "corpus"])
def test_disk_that_fills_before_training_is_named(num_bytes, text, tmp_path):
    run = tmp_path / "run"
    failed = subprocess.run(
        [sys.executable, "-m", "hybrid_tools.train", *arguments(text, run)],
        capture_output=True, text=True, env=environment(), timeout=120, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes)),
    )  # fmt: skip
    assert failed.returncode == 2, failed.stderr
    line = failed.stderr.splitlines()[-1]
    assert str(run) in line
    assert "make room there and run again" in line
    assert train(text, run, tokens=128) == 0


def test_nan_in_the_middle_stops_the_run_and_the_checkpoint_before_it_can_be_continued(text, tmp_path, capsys):
    """A weight of the newest checkpoint is poisoned; the run stops there, and goes on from the one before."""
    run = tmp_path / "run"
    options = ("--save-every=2", "--activation=swiglu")
    assert train(text, run, *options, tokens=6 * 128) == 0
    good = {steps: path.read_bytes() for steps, path in list_states(run / "checkpoints")}
    assert sorted(good) == [4, 6]
    newest = list_states(run / "checkpoints")[-1][1]
    state = load_state(newest)
    state.weights["norm"][3] = float("nan")
    newest.unlink()
    save_state(run / "checkpoints", type(state)(5, state.weights, state.moments))
    assert train(text, run, *options, tokens=6 * 128) == 2
    message = error_of(capsys)
    assert "step 6: the loss is nan" in message
    assert "what was saved before is untouched" in message
    assert "smaller --lr" in message
    kept = dict(list_states(run / "checkpoints"))
    assert kept[4].read_bytes() == good[4]
    kept[5].unlink()
    assert train(text, run, *options, tokens=6 * 128) == 0
    assert state_files(run)["step-00000006.safetensors"] == good[6]


@pytest.mark.parametrize("rate", ["1e3", "1e12"])
def test_run_that_diverges_is_an_error_and_writes_no_model(rate, text, tmp_path, capsys):
    options = ("--activation=swiglu", f"--lr={rate}", "--clip=1e12", "--warmup=0")
    assert train(text, tmp_path / "run", *options, tokens=3 * 128) == 2
    assert "smaller --lr" in error_of(capsys)
    assert not (tmp_path / "run" / "model").exists()


def test_weights_that_are_no_numbers_are_noticed_at_the_first_step(text, tmp_path, capsys):
    run = tmp_path / "run"
    options = ("--save-every=2", "--activation=drelu")
    assert train(text, run, *options, tokens=4 * 128) == 0
    state = load_state(list_states(run / "checkpoints")[-1][1])
    state.weights["norm"][3] = float("nan")
    for _, path in list_states(run / "checkpoints"):
        path.unlink()
    save_state(run / "checkpoints", type(state)(2, state.weights, state.moments))
    assert train(text, run, *options, tokens=4 * 128) == 2
    assert "step 3: the loss is nan" in error_of(capsys)


def test_export_writes_the_newest_checkpoint_and_the_run_goes_on_afterwards(text, tmp_path, capsys):
    run = tmp_path / "run"
    options = ("--activation=drelu", "--save-every=4", "--save-dtype=f32")
    assert train(text, run, *options, "--export", tokens=8 * 128) == 2
    assert "holds no checkpoint yet" in error_of(capsys)
    assert not run.exists()
    worker = start(text, run, *options, tokens=400 * 128)
    while worker.poll() is None and not list_states(run / "checkpoints"):
        time.sleep(0.01)
    worker.kill()
    worker.communicate()
    num_steps, path = list_states(run / "checkpoints")[-1]
    assert num_steps < 400
    assert train(text, run, *options, "--export", tokens=400 * 128) == 0
    exported = load_file(run / "model" / "model.safetensors")
    assert torch.equal(exported["model.norm.weight"], load_state(path).weights["norm"])
    assert json.loads((run / "model" / "training.json").read_text())["tokens_seen"] == num_steps * 128
    assert list_states(run / "checkpoints")[-1] == (num_steps, path)


def test_tokenizer_inside_a_gguf_file_cannot_be_copied(text, tmp_path, capsys):
    gguf = shared_data("models/stories260K/stories260K-f32.gguf")
    assert train(text, tmp_path / "run", f"--from={gguf}", tokens=128, sizes=CONTINUED) == 2
    assert "name one with --tokenizer" in error_of(capsys)


def test_broken_checkpoint_is_named(finished_swiglu, text, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(text, run, tokens=256) == 0
    path = list_states(run / "checkpoints")[-1][1]
    path.write_bytes(path.read_bytes()[:1000])
    assert train(text, run, tokens=256) == 2
    assert f"{path}: is no checkpoint of hybrid-train" in error_of(capsys)


def test_own_tokenizer_of_a_run_serves_another(finished_swiglu, text, tmp_path):
    tokenizer = finished_swiglu / "tokenizer"
    own = [each for each in SIZES if not each.startswith("--vocab-size")]
    for path in (tokenizer, tokenizer / "tokenizer.model"):
        run = tmp_path / path.name
        assert train(text, run, f"--tokenizer={path}", tokens=128, sizes=own) == 0
        assert (run / "model" / "tokenizer.model").read_bytes() == (tokenizer / "tokenizer.model").read_bytes()
