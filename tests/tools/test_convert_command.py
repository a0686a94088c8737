"""hybrid-convert as a user meets it: exit codes, one line for every error, results on stdout and progress on stderr."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from hybrid_runtime.demo import make_demo
from hybrid_runtime.errors import IncompleteStore
from hybrid_runtime.store.reader import open_store
from hybrid_tools.convert import main

PROGRAM = [sys.executable, "-m", "hybrid_tools.convert"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny matrices: two threads that wait for each other take thirty times as long beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make_demo(tmp_path_factory.mktemp("demo") / "demo")


@pytest.fixture
def refused(capsys):
    """Runs the program, which must fail; its one line."""

    def run(*argv):
        assert main([str(each) for each in argv]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        *before, line = captured.err.splitlines()
        assert line.startswith("hybrid-convert: ")
        assert all(each.startswith(("converting ", "resuming ")) for each in before)
        return line

    return run


def test_stdout_is_the_folder_and_stderr_shows_bytes_and_speed(demo, tmp_path, capsys):
    folder = tmp_path / "store"
    assert main([str(demo), "-o", str(folder), "--quant", "bf16", "--verify"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{folder}\n"
    first, *_, last_progress, summary = captured.err.splitlines()
    assert re.fullmatch(r"converting demo: 1\.\d+ MB", first)
    # All bytes, padding included: a step that ends at 97 % looks as if it had failed.
    assert re.fullmatch(r"converting demo: (\S+ MB) of \1 \(100 %\), \S+ [kMG]?B/s, took \d+:\d\d", last_progress)
    assert re.fullmatch(rf"{demo}: 1\.\d\d MiB in bf16, \d+\.\d s, verified", summary)
    assert open_store(folder).manifest.model == "demo"


def test_a_finished_store_is_named_again_without_progress(demo, tmp_path, capsys):
    argv = [str(demo), "-o", str(tmp_path / "store"), "--quant", "f32"]
    assert main(argv) == 0
    capsys.readouterr()
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'store'}\n"
    assert len(captured.err.splitlines()) == 1


def test_verify_finds_one_flipped_bit_and_says_how_to_mend_it(demo, tmp_path, refused, capsys):
    argv = [str(demo), "-o", str(tmp_path / "store"), "--quant", "f32", "--verify"]
    assert main(argv) == 0
    store = open_store(tmp_path / "store")
    part = store.data_folder / store.manifest.parts[3].file
    before = part.read_bytes()
    part.write_bytes(bytes([*before[:1000], before[1000] ^ 4, *before[1001:]]))
    capsys.readouterr()
    line = refused(*argv)
    assert f"{part}: its sha256 is not the manifest's; the file is damaged: convert" in line
    assert line.endswith(", after removing that file")
    part.unlink()
    assert main(argv) == 0
    assert part.read_bytes() == before


def test_a_store_is_refused_by_name(demo, tmp_path, refused, capsys):
    assert main([str(demo), "-o", str(tmp_path / "store"), "--quant", "f32"]) == 0
    capsys.readouterr()
    line = refused(tmp_path / "store", "-o", tmp_path / "other")
    assert line == (
        f"hybrid-convert: {tmp_path / 'store'}: is a store already; convert the checkpoint that it was made from"
    )
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--quant", "q4", "--group", "48"],
            r"--group 48: .*one of \(?32, 64, 128",
        ),
        (["--quant", "q8", "--group", "0"], r"--group 0: .*one of \(?32, 64, 128"),
        (["--quant", "f32", "--group", "32"], "--group 32: f32 weights share no scales; leave it out, or choose .*q4"),
        (
            ["--quant", "bf16", "--group", "48"],
            "--group 48: bf16 weights share no scales; leave it out, or choose .*q4",
        ),
        (["--quant", "q5"], "'--quant': 'q5' is not one of 'f32', 'bf16', 'q8', 'q4'"),
        (["--quant", "q4", "--group", "many"], "'--group': 'many' is not a valid integer"),
        (["--ffn-activation", "swish"], "swish"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_that_cannot_be_honoured_is_named(demo, tmp_path, refused, options, message):
    assert re.search(message, refused(demo, "-o", tmp_path / "store", *options))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("quant", ["f32", "bf16"])
def test_a_group_that_nobody_gave_is_no_contradiction(demo, tmp_path, quant):
    assert main([str(demo), "-o", str(tmp_path / "store"), "--quant", quant]) == 0


def test_the_output_is_required(demo, refused):
    assert "--output" in refused(demo)


@pytest.mark.parametrize("broken", ["nothing", "empty-folder", "no-weights", "cut-weights"])
def test_a_broken_model_is_one_line(demo, tmp_path, refused, broken):
    model = tmp_path / "model"
    shutil.copytree(demo, model)
    if broken == "empty-folder":
        shutil.rmtree(model)
        model.mkdir()
    elif broken == "no-weights":
        (model / "model.safetensors").unlink()
    elif broken == "cut-weights":
        os.truncate(model / "model.safetensors", 100_000)
    else:
        model = tmp_path / "nothing.gguf"
        model.write_bytes(b"")
    assert str(model) in refused(model, "-o", tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_folder_of_something_else_is_refused(demo, tmp_path, refused):
    (tmp_path / "thesis.txt").write_text("years of work")
    line = refused(demo, "-o", tmp_path)
    assert line == f"hybrid-convert: {tmp_path}: is neither empty nor a store; choose another folder"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_help_names_units_and_defaults(capsys):
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "--quant [f32|bf16|q8|q4]",
        "[default: f32 up to 268 M parameters, else q4]",
        "Weights that share a scale, for q8 and q4: 32, 64 or 128. [default: 32]",
        "-o, --output DIR",
        "--verify",
    ):
        assert words in text


def test_killed_as_a_program_it_says_so_and_resumes(demo, tmp_path):
    """The whole way once: python -m, SIGKILL at the first part, the error of a reader, the same command again."""
    folder, log = tmp_path / "store", tmp_path / "log"
    argv = [*PROGRAM, str(demo), "-o", str(folder), "--quant", "f32"]
    with log.open("w") as stderr, subprocess.Popen(argv, stderr=stderr, stdout=subprocess.PIPE) as process:
        while not any('"file"' in path.read_text() for path in folder.glob("data-*/journal.jsonl")):
            assert process.poll() is None, log.read_text()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "store.json").exists()
    with pytest.raises(IncompleteStore, match="has not finished; run the same hybrid-convert command again"):
        open_store(folder)
    again = subprocess.run([*argv, "--verify"], capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (0, f"{folder}\n"), again.stderr
    assert again.stderr.startswith("resuming demo: ")
    assert again.stderr.endswith(" s, verified\n")


def test_interrupted_by_the_keyboard_it_ends_with_130(demo, tmp_path, monkeypatch, capsys):
    def press_control_c(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hybrid_runtime.progress.PlainProgress.advance", press_control_c)
        assert main([str(demo), "-o", str(tmp_path / "store"), "--quant", "f32"]) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert not list((tmp_path / "store").rglob("*.tmp"))
    assert main([str(demo), "-o", str(tmp_path / "store"), "--quant", "f32"]) == 0
