"""The benchmark of predictions, run on the default model. How close they should come is the benchmark's business."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from hybrid_runtime.machine import cache_bytes
from hybrid_runtime.placement import planning

from .made_up import speeds_of

PROGRAM = Path(__file__).parents[3] / "benchmarks" / "decode_prediction.py"
FACTOR = 4  # others use the processor while tests run


@pytest.fixture(scope="module")
def program():
    spec = spec_from_file_location("decode_prediction", PROGRAM)
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # where its dataclasses look up their types
        spec.loader.exec_module(module)
        yield module


@pytest.mark.slow
def test_the_default_model_is_predicted(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "ROUNDS", 3)
    monkeypatch.setattr(program, "CALIBRATION_ROUNDS", 2)

    def speeds(_machine, _row_format, _num_threads, cache_dir, _say):  # whose kernels are measured every round
        cache_dir.mkdir(exist_ok=True)
        return speeds_of(cache_bytes=cache_bytes())

    monkeypatch.setattr(planning, "machine_speeds", speeds)
    assert program.main([str(tmp_path), "--shape", "tinystories-moe", "--results", str(tmp_path / "results")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (file,) = (tmp_path / "results").iterdir()
    assert json.loads(file.read_text()) == result
    assert result["machine"]["usable_cores"] >= 1
    (row,) = result["rows"]
    assert 1 / FACTOR < row["time_ratio"] < FACTOR
    assert row["time_ratio"] == pytest.approx(row["predicted_ms"] / row["measured_ms"])
    assert len(row["predicted_rounds_ms"]) == len(row["measured_rounds_ms"]) == 3
    assert sum(row["predicted_parts_ms"].values()) == pytest.approx(row["predicted_ms"])
    assert row["measured_bytes"] > 1 << 27
    assert {path.name for path in tmp_path.iterdir()} == {"results", "speeds"}
    assert list((tmp_path / "speeds").iterdir()) == []  # the calibration's models are gone
