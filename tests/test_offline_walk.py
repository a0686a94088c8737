"""The walk of docs/offline.md, from a checkpoint to a plan: its commands, run one after another on a small model."""

import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.placement import planning
from hybrid_runtime.speeds.disk import DiskSpeeds
from hybrid_runtime.speeds.kernel_speeds import KernelSpeeds
from hybrid_runtime.speeds.machine_speeds import MachineSpeeds
from tests.hybrid_runtime.small_models import LLAMA, write_model

ROOT = Path(__file__).parent.parent
TEXT = "Hello world, once upon a time there was a neuron and the others and a layer. " * 400
# what makes a walk of minutes one of seconds
SMALLER = {
    "hybrid-profile": ["--tokens", "8192", "--window", "128"],
    "hybrid-predictors train": ["--epochs", "1", "--max-share", "1"],
    "hybrid-run": ["--max-tokens", "3"],
}


def documented_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "offline.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def made_up_speeds(*_arguments, **_options) -> MachineSpeeds:
    """Measuring takes many seconds and is tested elsewhere."""
    kernel = KernelSpeeds("q8", 32, 1, 2e-6, 2e-8, 2e10, 2e10, 1.5e10, 1.8e10, 1e-10)
    assert kernel.row_format == RowFormat("q8", 32)
    return MachineSpeeds(
        1, "0" * 64, "2026-11-23T00:00:00Z", "a CPU", 1, 1 << 25, 2e10, DiskSpeeds(3e4, 7e8, True), None, (kernel,)
    )


@pytest.fixture(scope="module")
def programs():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    return {name: importlib.import_module(target.split(":")[0]).main for name, target in scripts.items()}


def test_the_walk_from_a_checkpoint_to_a_plan(programs, tmp_path, monkeypatch, capsys):
    write_model(tmp_path / "checkpoint", LLAMA | {"model_type": "bamboo", "hidden_act": "relu"})
    (tmp_path / "text").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYBRID_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(planning, "machine_speeds", made_up_speeds)
    monkeypatch.setattr("hybrid_runtime.speeds.machine_speeds.machine_speeds", made_up_speeds)
    commands = documented_commands()
    walked = {shlex.split(command)[0] for command in commands}
    assert walked >= {"hybrid-convert", "hybrid-profile", "hybrid-predictors", "hybrid-doctor", "hybrid-place"}
    assert walked >= {"hybrid-inspect", "hybrid-run"}
    outputs = {}
    for command in commands:
        program, *arguments = shlex.split(command)
        names = {"CHECKPOINT": "checkpoint", "STORE": "store", "TEXT": "text"}
        key = f"{program} {arguments[0]}" if program == "hybrid-predictors" else program
        smaller = SMALLER.get(key, [])
        assert programs[program]([names.get(each, each) for each in arguments] + smaller) == 0, command
        outputs[command] = capsys.readouterr().out
    assert "tokens/s predicted" in outputs["hybrid-place STORE --ram 12G"]
    assert (tmp_path / "report.html").read_text().startswith("<!")
    assert list((tmp_path / "store" / "plans").glob("*/plan.json"))
