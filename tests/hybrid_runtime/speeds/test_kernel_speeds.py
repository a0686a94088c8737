"""The constants of a machine come back out of timings that it would give; a real machine's are plausible."""

from dataclasses import astuple

import pytest

from hybrid_kernels.team import Team
from hybrid_runtime.benchmarking.bytes_touched import BytesTouched
from hybrid_runtime.speeds import kernel_speeds as module
from hybrid_runtime.speeds.kernel_speeds import KernelSpeeds, _fitted, _measured, _shape, _Timed

from ..placement.made_up import Q4, Q8  # noqa: TID252  # absolute names are the runtime's

OPERATION_S, ROW_S, VALUE_S = 5e-6, 9e-9, 2e-10
CACHED, DENSE, SPARSE = 50e9, 15e9, 9e9


def timed(scale, row_s, *, dense=CACHED, sparse=CACHED, predictor=0, layers=4):
    """What a machine of these constants takes, exactly."""
    touched = BytesTouched(100, 50, 7_000 * scale, 0, predictor, 30_000 * scale, 9_000 * scale, 5_000)
    operations = {
        "begin": 1,
        "attention": 3 * layers,
        "KV cache": layers,
        "neurons": 2 * layers,
        "head": 1,
        "predictor": 2 * layers if predictor else 0,
        "router": 0,
    }
    num_rows, length, query_values = 40.0 * scale, 12.5, 128
    bytes_s = {
        "begin": touched.embedding / dense,
        "attention": touched.attention / dense,
        "KV cache": touched.kv_cache / dense + length * layers * query_values * VALUE_S,
        "neurons": touched.neurons / sparse + num_rows * row_s,
        "head": touched.head / dense,
        "predictor": predictor / dense,
        "router": 0.0,
    }
    seconds = {label: count * OPERATION_S + bytes_s[label] for label, count in operations.items()}
    return _Timed(touched, num_rows, seconds, operations, length, layers, query_values)


@pytest.mark.parametrize("row_s", [0.0, ROW_S])
@pytest.mark.parametrize("row_format", [Q4, Q8], ids=str)
def test_timings_that_follow_the_model_give_its_constants_back(row_s, row_format):
    masked = timed(500, row_s, dense=DENSE, sparse=SPARSE, predictor=3_000_000, layers=2)
    ungated = timed(500, row_s, dense=DENSE, sparse=DENSE, layers=2)
    found = _fitted(row_format, 3, timed(1, row_s), timed(20, row_s), masked, ungated)
    expected = KernelSpeeds(row_format.kind, row_format.group, 3, OPERATION_S, row_s, CACHED, DENSE, SPARSE, VALUE_S)
    assert astuple(found)[:3] == astuple(expected)[:3]
    assert astuple(found)[3:] == pytest.approx(astuple(expected)[3:], rel=1e-6, abs=1e-15)
    assert found.row_format == row_format


def test_timings_that_make_no_sense_still_give_speeds():
    """As noise may: the larger model is the faster one."""
    tiny, small = timed(1, ROW_S), timed(20, ROW_S)
    backwards = _Timed(small.touched, small.num_rows, {k: v / 50 for k, v in tiny.seconds.items()}, small.operations,
                       12.5, 4, 128)  # fmt: skip
    found = _fitted(Q4, 1, tiny, backwards, backwards, backwards)
    assert found.operation_s > 0
    assert min(found.cached_bytes_per_s, found.dense_bytes_per_s, found.sparse_bytes_per_s) > 0
    assert found.attention_value_s >= 0


@pytest.mark.parametrize("mode", ["off", "mask"])
def test_a_model_is_timed_by_part(mode, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "NUM_ROUNDS", 2)
    monkeypatch.setattr(module, "NUM_TOKENS", 4)
    team = Team(1)
    try:
        timed = _measured(_shape(128, 256, 2, 96), Q4, team, tmp_path / "tiny", mode)
    finally:
        team.close()
    assert timed.num_layers == 2
    assert timed.mean_length == 2.5
    assert timed.operations["predictor"] == (4 if mode == "mask" else 0)
    assert timed.operations["attention"] == 6
    for label, count in timed.operations.items():
        assert (timed.seconds[label] > 0) == (count > 0), label
    assert sum(timed.seconds.values()) < 0.1
    most = 2 * 256
    assert 0 < timed.num_rows < 3 * most
    assert (timed.touched.predictor > 0) == (mode == "mask")


@pytest.mark.slow
def test_this_machine_is_measured(monkeypatch):
    monkeypatch.setattr(module, "NUM_ROUNDS", 3)
    found = module.measure_kernel_speeds(Q4, 1)
    assert found.row_format == Q4
    assert found.num_threads == 1
    assert found.operation_s > 0
    assert 1e8 < found.sparse_bytes_per_s < 1e12
    assert 1e8 < found.dense_bytes_per_s < 1e12
