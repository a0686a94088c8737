"""The study's script on runs that take a second: its numbers are the models', and its tables hold its numbers."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from .tiny_runs import train

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "relu_study.py"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("relu_study", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_report_measures_runs_alike_and_prints_what_it_writes(study, finished_swiglu, text, tmp_path):
    drelu = tmp_path / "drelu"
    assert train(text, drelu, "--activation=drelu", "--save-dtype=f32") == 0
    output, pictures = tmp_path / "numbers.json", tmp_path / "pictures"
    arguments = ["report", f"--run=swiglu={finished_swiglu}", f"--run=drelu={drelu}", f"-o{output}"]
    result = CliRunner().invoke(study.command, [*arguments, f"--pictures={pictures}"], catch_exceptions=False)
    assert result.exit_code == 0
    numbers = json.loads(output.read_text())
    for name, run in (("swiglu", finished_swiglu), ("drelu", drelu)):
        row = numbers[name]
        stated = json.loads((run / "model" / "training.json").read_text())
        assert row["perplexity"]["all"] == pytest.approx(math.exp(stated["held_out_losses"]["all"]), rel=1e-4)
        assert row["held_out_tokens"] == stated["held_out_tokens"]
        kept = row["perplexity_when_kept"]
        assert kept["1"] == pytest.approx(row["perplexity"]["all"], rel=1e-5)
        assert kept["0.05"] != kept["1"]
        assert re.search(rf"\| {name} \| [0-9.]+M \| 0\.[0-9] \| {row['perplexity']['all']:.2f} \|", result.output)
        assert [sum(shares) for shares in row["expert_shares"]] == pytest.approx([1, 1])
    assert numbers["swiglu"]["zeros"] == 0
    assert numbers["swiglu"]["parameters"] == numbers["drelu"]["parameters"]
    assert 0.4 < numbers["drelu"]["zeros"] < 1
    assert numbers["drelu"]["zeros_by_layer"] != numbers["drelu"]["zeros_by_layer"][::-1]
    drawn = {path.name: path.stat().st_size for path in pictures.iterdir()}
    assert drawn.keys() == {f"numbers-{name}.png" for name in ("losses", "zeros", "frequencies")}
    assert min(drawn.values()) > 1000


def test_what_continues_a_run_is_not_trained_before_it(study, text, tmp_path):
    result = CliRunner().invoke(study.command, ["train", f"--text={text}", f"--runs={tmp_path}", "relufied"])
    assert result.exit_code == 2
    assert "relufied continues swiglu, which is not trained yet" in result.output


def test_every_run_of_the_study_is_a_command_that_hybrid_train_takes(study, text, tmp_path, monkeypatch):
    """As far as its options go; only the commands are looked at, trained is nothing."""
    (tmp_path / "swiglu" / "model").mkdir(parents=True)
    seen = []
    monkeypatch.setattr(study, "train", lambda argv: seen.append(argv) or 0)
    result = CliRunner().invoke(
        study.command, ["train", f"--text={text}", f"--runs={tmp_path}"], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert len(seen) == len(study.RUNS)
    from hybrid_tools.train import command  # noqa: PLC0415  # click's own parser checks them

    for argv in seen:
        options = command.make_context("hybrid-train", list(argv)).params
        assert options["texts"] == (str(text),)
        assert (options["source"] is None) == (options["hidden_size"] == 128)
