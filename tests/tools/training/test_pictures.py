"""Pictures show what the log says; a log without tests or an expert without tokens draws too."""

import json
import sys

import pytest
import torch

from hybrid_runtime.errors import UsageError
from hybrid_tools.training import pictures
from hybrid_tools.training.pictures import draw_frequencies, draw_losses, draw_run, draw_sparsity
from hybrid_tools.training.sparsity import Firing

PNG = b"\x89PNG\r\n\x1a\n"


def write_log(path, num_steps, *, tests=True):
    lines = []
    for step in range(1, num_steps + 1):
        lines.append({"step": step, "loss": 8.0 - step / 50, "zeros": min(0.9, step / 100), "seconds": 0.1})
        if tests and step % 10 == 0:
            lines.append({"step": step, "held_out": {"a.txt": 7.0, "all": 8.1 - step / 50}})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def curves(monkeypatch):
    """What each curve of the next picture is made of, by its label."""
    found = {}
    save = pictures._save

    def look(figure, picture):
        for axes in figure.axes:
            for line in axes.get_lines():
                found[line.get_label()] = line.get_xydata().tolist()
        save(figure, picture)

    monkeypatch.setattr(pictures, "_save", look)
    return found


@pytest.mark.parametrize("tests", [True, False], ids=["tested", "never-tested"])
def test_curve_of_a_run_is_its_log(tmp_path, curves, tests):
    log = write_log(tmp_path / "log.jsonl", 40, tests=tests)
    draw_run(log, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    assert curves["training"][0] == [1.0, pytest.approx(7.98)]
    assert curves["training"][-1] == [40.0, pytest.approx(7.2)]
    assert ("held out" in curves) == tests
    if tests:
        assert curves["held out"][-1] == [40.0, pytest.approx(7.3)]


def test_long_runs_are_smoothed_to_means(tmp_path, curves):
    draw_run(write_log(tmp_path / "log.jsonl", 1000), tmp_path / "curves.svg")
    assert len(curves["training"]) == 100
    assert curves["training"][0] == [5.5, pytest.approx(8 - 5.5 / 50)]
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")


def test_several_runs_share_a_picture(tmp_path, curves):
    logs = {name: write_log(tmp_path / f"{name}.jsonl", 20) for name in ("swiglu", "drelu")}
    draw_losses(logs, tmp_path / "losses.png")
    assert {"swiglu training", "swiglu held out", "drelu training", "drelu held out"} <= set(curves)


def test_sparsity_and_frequencies_draw_experts_that_saw_nothing(tmp_path, curves):
    firing = Firing((torch.tensor([[9, 1, 0, 0], [0, 0, 0, 0]]),) * 2, (torch.tensor([10, 0]),) * 2)
    draw_sparsity({"drelu": firing}, tmp_path / "zeros.png")
    assert curves["drelu"] == [[0.0, pytest.approx(75.0)], [1.0, pytest.approx(75.0)]]
    draw_frequencies({"drelu": firing}, tmp_path / "frequencies.png")
    assert curves["layer 1"][:2] == [[12.5, pytest.approx(90.0)], [25.0, pytest.approx(100.0)]]


def test_without_matplotlib_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"pip install 'hybrid-runtime\[train\]'"):
        draw_run(write_log(tmp_path / "log.jsonl", 3), tmp_path / "curves.png")
