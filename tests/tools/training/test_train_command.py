"""hybrid-train as a user meets it: what is typed, what is refused, what goes where."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import shutil
import subprocess
import sys

import click
import pytest

from hybrid_runtime import __version__
from hybrid_tools.train import ACTIVATIONS, SHAPE_OPTIONS, Count, main

from .tiny_runs import environment, train

CONTINUED = ["--seq-len=32", "--batch-tokens=128", "--held-out=0.1", "--threads=1", "--device=cpu"]


def refusal_of(capsys):
    """The one line, and nothing on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("hybrid-train: ")]
    assert captured.err.splitlines()[-1] == line
    return line


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1", 1),
        ("500000", 500_000),
        ("500K", 500_000),
        ("500k", 500_000),
        ("6M", 6_000_000),
        ("1.5B", 1_500_000_000),
        ("0.5K", 500),
        ("2.01M", 2_010_000),  # 2.01 * 10**6 is no whole float
        ("16.1K", 16_100),
    ],
)
def test_counts_are_read_with_their_units(text, number):
    assert Count().convert(text, None, None) == number


@pytest.mark.parametrize("text", ["", "K", "many", "0", "-5", "1.5", "0.0001K", "nan", "inf", "1e30", "6G"])
def test_what_is_no_count_is_refused_with_an_example_or_a_reason(text):
    with pytest.raises(click.BadParameter, match=r"is not a (whole )?number of tokens"):
        Count().convert(text, None, None)


def test_help_names_defaults_and_does_not_import_torch():
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "hybrid_tools.train", "--help"],
        capture_output=True, text=True, env=environment(), check=True,
    )  # fmt: skip
    text = " ".join(shown.stdout.split())
    for words in ("--text FILE[@WEIGHT]", "-o, --output DIR", "--relufy [relu|drelu|fatrelu]", "[default: 4096]"):
        assert words in text
    modules = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert "click" in modules
    assert not modules & {"torch", "sentencepiece", "transformers"}


def test_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["--text", "--tokens", "--output"])
def test_what_is_required_is_named(missing, text, tmp_path, capsys):
    options = {"--text": str(text), "--tokens": "128", "--output": str(tmp_path / "run")}
    assert main([word for name, value in options.items() if name != missing for word in (name, value)]) == 2
    assert f"'{missing}'" in refusal_of(capsys)


@pytest.mark.parametrize("name", sorted(SHAPE_OPTIONS))
def test_a_shape_beside_a_source_is_refused_though_it_is_the_default(name, text, tmp_path, capsys):
    flag = f"--{name.replace('_', '-')}"
    value = [] if name == "tie_embeddings" else ["4"]
    argv = [f"--text={text}", "--tokens=128", f"--output={tmp_path / 'run'}", f"--from={tmp_path}", flag, *value]
    assert main(argv) == 2
    assert refusal_of(capsys) == f"hybrid-train: {flag} is of a new model; --from has its own"


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_an_activation_beside_a_source_is_refused(kind, text, tmp_path, capsys):
    argv = [f"--text={text}", "--tokens=128", f"--output={tmp_path / 'run'}", f"--from={tmp_path}"]
    assert main([*argv, f"--activation={kind}"]) == 2
    assert "say --relufy to replace the activation of --from" in refusal_of(capsys)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (("--seed=-1",), "seed"),
        (("--vocab-size=99999999999",), "vocab-size"),
        (("--activation=fatrelu", "--fatrelu-threshold=inf"), "threshold"),
        (("--layers=0",), "--layers"),
        (("--kv-heads=0",), "--kv-heads"),
        (("--rope-theta=nan",), "--rope-theta"),
        (("--context=0",), "--context"),
        (("--clip=inf",), "--clip"),
        (("--l1=nan",), "--l1"),
        (("--held-out=nan",), "--held-out"),
        (("--device=tpu",), "--device"),
        (("--save-every=0",), "--save-every"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_numbers_at_the_edge_are_one_line_not_a_traceback(options, flag, text, tmp_path, capsys):
    assert train(text, tmp_path / "run", *options, tokens=128) == 2
    assert flag in refusal_of(capsys)


def test_a_file_whose_name_ends_like_a_weight_can_be_named(text, tmp_path):
    path = shutil.copy(text, tmp_path / "words@2")
    assert train(path, tmp_path / "run", tokens=128) == 0


def test_the_command_is_kept_so_that_it_can_be_typed_again(text, tmp_path, capsys):
    run = tmp_path / "a run"
    copy = shutil.copy(text, tmp_path / "two words.txt")
    assert train(copy, run, "--tie-embeddings", f"--text={text}@0.5", tokens="0.256K") == 0
    printed = capsys.readouterr()
    assert printed.out == f"{run / 'model'}\n"
    command = json.loads((run / "run.json").read_text())["command"]
    assert command == json.loads((run / "model" / "training.json").read_text())["command"]
    assert re.search(rf"--text '{copy}' --text {text}@0.5 ", command)
    assert " --tokens 256 " in command
    assert "--tie-embeddings" in command
    assert "--lr" not in command  # nobody typed it
    assert main(shlex.split(command)[1:]) == 0  # the same run: it is finished
    assert json.loads((run / "run.json").read_text())["command"] == command


def test_gzip_and_plain_text_give_the_same_weights(text, tmp_path):
    packed = tmp_path / "words.txt.gz"
    packed.write_bytes(gzip.compress(text.read_bytes()))
    for name, file in (("plain", text), ("packed", packed)):
        assert train(file, tmp_path / name, tokens=256) == 0
    plain, unpacked = (tmp_path / name / "model" / "model.safetensors" for name in ("plain", "packed"))
    assert plain.read_bytes() == unpacked.read_bytes()
