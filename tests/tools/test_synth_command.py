"""hybrid-synth as a user meets it: what it prints, what it refuses, and that hybrid-run runs what it writes."""

from __future__ import annotations

import re

import pytest
import torch

from hybrid_runtime.cli.run import main as run_main
from hybrid_runtime.store.reader import open_store
from hybrid_tools.synth import main


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny matrices: two threads that wait for each other take thirty times as long beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_stdout_is_the_folder_and_stderr_says_synthetic(tmp_path, capsys):
    folder = tmp_path / "store"
    argv = ["--like", "tiny-turbosparse", "--scale", "0.67", "--active", "0.2", "--skew", "0.5", "--seed", "7"]
    assert main([*argv, "--quant", "q8", "--group", "64", "-o", str(folder)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{folder}\n"
    first, *_, summary = captured.err.splitlines()
    assert re.fullmatch(r"converting synthetic-tiny-turbosparse-2-of-3-layers: \d\.\d+ MB", first)
    assert re.fullmatch(r"synthetic-tiny-turbosparse-2-of-3-layers: \S+ MiB in q8 group 64, \d+\.\d s", summary)
    source = open_store(folder).manifest.source
    assert re.fullmatch(r"synthetic 1: like tiny-turbosparse [0-9a-f]{16} seed 7 active 0\.2 skew 0\.5", source)


@pytest.mark.parametrize(
    "like", ["tiny-turbosparse", "tiny-turbosparse-mixture", "tiny-prosparse", "tiny-opt", "stories260k"]
)
def test_hybrid_run_runs_it_and_prints_text_without_meaning(like, tmp_path, capsys):
    folder = tmp_path / "store"
    assert main(["--like", like, "-o", str(folder)]) == 0
    capsys.readouterr()
    argv = ["--model", str(folder), "--prompt", "Once upon a time", "--max-tokens", "8", "--temperature", "0"]
    assert run_main(argv) == 0
    assert "word" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Missing option '--like'"),
        (["--like", "gpt-5"], "Missing option '--output'"),
        (["--like", "gpt-5", "-o", "DIR"], "hybrid-synth: --like gpt-5: known shapes are"),
        (["--like", "bamboo-7b", "--active", "0", "-o", "DIR"], "hybrid-synth: --active 0.0: expected the share"),
        (["--like", "bamboo-7b", "--layers", "0", "-o", "DIR"], "hybrid-synth: --layers 0: bamboo-7b has 32"),
        (["--like", "bamboo-7b", "--quant", "q3", "-o", "DIR"], "'q3' is not one of"),
        (["--like", "llama-2-7b", "-o", __file__], "is a file; name a folder for the store"),
    ],
)
def test_bad_arguments_are_refused_in_one_line_with_the_name(argv, message, tmp_path, capsys):
    assert main([str(tmp_path / "store") if each == "DIR" else each for each in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert message in line
    assert not (tmp_path / "store").exists()
