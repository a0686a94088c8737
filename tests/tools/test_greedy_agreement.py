"""The script that compares greedy texts: the same weights agree, a random model's q4 does not with its f32."""

import importlib.util
from pathlib import Path

import pytest
from click.testing import CliRunner

from hybrid_runtime.demo import make_demo

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "greedy_agreement.py"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("greedy_agreement", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize(("kinds", "same"), [("f32,f32", range(5, 6)), ("f32,q4", range(5))])
def test_it_counts_texts_that_are_the_same(kinds, same, main, tmp_path):
    demo = make_demo(tmp_path / "demo")
    text = tmp_path / "words.txt"
    text.write_text("<|endoftext|>".join(f"the {number} cats saw a red ball and ran" for number in range(1000)))
    options = [f"--text={text}", f"--kinds={kinds}", "--prompts=5", "--tokens=24"]
    result = CliRunner().invoke(main, [str(demo), *options], catch_exceptions=False)
    assert result.exit_code == 0
    *lines, last = result.output.splitlines()
    lines = [line for line in lines if line.startswith(("same", "different"))]
    assert len(lines) == 5
    count = sum(line.startswith("same") for line in lines)
    assert count in same
    assert last == f"{kinds}: {count} of 5 texts of 24 tokens are the same"
