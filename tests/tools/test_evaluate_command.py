"""hybrid-eval perplexity: the number goes to stdout, progress to stderr, and what cannot be scored is one line."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest

from hybrid_runtime.demo import make_demo
from hybrid_tools.evaluate import main

TEXT = "Every token takes the same path as in a large sparse mixture of experts. " * 40


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    make_demo(folder / "model")
    (folder / "text").write_text(TEXT)
    return folder


@pytest.fixture
def evaluate(files, capsys, monkeypatch):
    def evaluate(*arguments, text="text"):
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        named = ["--model", str(files / "model"), "--text", str(files / text), "--cache-dir", str(files / "cache")]
        code = main(["perplexity", *named, "--threads", "1", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return evaluate


@pytest.mark.parametrize("protocol", ["half", "full"])
def test_line_says_what_was_measured(evaluate, protocol):
    code, out, err = evaluate("--ctx", "64", "--max-windows", "3", "--protocol", protocol)
    assert code == 0
    assert re.fullmatch(
        rf"perplexity \d+\.\d{{4}} \+/- \d+\.\d{{4}} \({protocol}, ctx 64, "
        rf"{3 * 31 if protocol == 'half' else 3 * 64} tokens in 3 windows, f32\)\n",
        out,
    )
    assert [line.split(":")[0] for line in err if line.startswith("window")] == ["window 1", "window 2", "window 3"]


def test_json_has_the_same_number(evaluate):
    _, line, _ = evaluate("--ctx", "64")
    code, out, _ = evaluate("--ctx", "64", "--json")
    answer = json.loads(out)
    assert code == 0
    assert f"perplexity {answer['perplexity']:.4f} +/- {answer['standard_error']:.4f}" in line
    assert (answer["protocol"], answer["window"], answer["quantization"]) == ("half", 64, "f32")
    assert answer["num_windows"] * 31 == answer["num_scored"]


def test_window_is_512_unless_asked(evaluate):
    assert "ctx 512, 255 tokens in 1 windows" in evaluate("--max-windows", "1")[1]


@pytest.mark.parametrize(
    ("content", "flags", "named"),
    [
        (b"too short", (), "tokens, protocol half needs at least 512"),
        (b"", ("--protocol", "full"), "needs at least 2"),
        (b"caf\xe9 " * 600, (), "is not UTF-8 at byte 3"),
        (None, (), "No such file or directory"),
        (b"x" * 2000, ("--max-windows", "0"), "--max-windows"),
        (b"x" * 2000, ("--ctx", "0"), "--ctx"),
        (b"x" * 2000, ("--ctx", "3"), "--ctx 3: protocol half needs at least 4"),
        (b"x" * 2000, ("--protocol", "third"), "--protocol"),
        (b"x" * 2000, ("--ram", "1M"), "--ram 1.00 MiB"),
    ],
    ids=["short", "empty", "not-utf8", "missing", "no-windows", "ctx-0", "ctx-3", "protocol", "ram"],
)
def test_what_cannot_be_scored_is_one_line(evaluate, files, content, flags, named):
    evaluate("--max-windows", "1")  # so that the store is there and nothing is converted below
    path = files / "bad"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    code, out, err = evaluate(*flags, text="bad")
    assert (code, out, len(err)) == (2, "", 1)
    assert named in err[0]
    assert err[0].startswith(("hybrid-eval: ", "perplexity: "))


def test_text_that_is_a_folder_is_one_line(evaluate, files):
    code, _, err = evaluate(text=".")
    assert (code, len(err)) == (2, 1)
    assert "Is a directory" in err[0]


def test_help_lists_units_and_defaults(capsys):
    assert main(["perplexity", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("perplexity: 512", "[default: half]", "e.g. 12G", "--max-windows"):
        assert words in shown


def test_cache_holds_one_store_and_no_leavings(evaluate, files):
    evaluate("--max-windows", "1")
    (store,) = (files / "cache" / "stores").iterdir()
    assert not list(store.rglob("*.tmp"))
    assert Path(files / "cache").is_dir()
    shutil.rmtree(files / "cache")
