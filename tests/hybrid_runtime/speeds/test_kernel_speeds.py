"""The constants of a machine come back out of timings that it would give; a real machine's are plausible."""

from dataclasses import astuple, replace

import pytest

from hybrid_runtime.benchmarking.bytes_touched import BytesTouched
from hybrid_runtime.model.decoder import Decoder
from hybrid_runtime.speeds import kernel_speeds as module
from hybrid_runtime.speeds.kernel_speeds import (
    LEAST_PER_BYTE_S,
    CalibrationModel,
    KernelSpeeds,
    Timed,
    fitted,
    model_shape,
    modes_of,
    nonnegative_fit,
)

from ..placement.made_up import Q4, Q8  # noqa: TID252  # absolute names are the runtime's

MACHINE = KernelSpeeds(
    "q4", 32, 3, 5e-6, 9e-9, 50e9, 15e9, 9e9, 7e9, 2e-10, token_s=30e-6, dense_row_s=4e-9, attend_s=3e-6
)


def timed(scale, *, row_bytes, is_large=False, every_gate=False, machine=MACHINE):
    """What a machine of these constants takes, exactly. scale: of the numbers of rows."""
    layers, looked_at = 4, 100.0 * scale * row_bytes
    num_rows = {"attention": 30.0 * scale, "head": 200.0 * scale, "predictor": 0.0, "router": 0.0}
    num_rows |= {"neurons": 90.0 * scale} | ({"predictor": 70.0 * scale} if is_large and not every_gate else {})
    num_bytes = {part: rows * row_bytes for part, rows in num_rows.items()}
    touched = BytesTouched(100, 50, num_bytes["attention"], 0, num_bytes["predictor"], num_bytes["neurons"],
                           num_bytes["head"], 5_000)  # fmt: skip
    operations = {"begin": 1, "attention": 2 * layers, "KV cache": layers, "neurons": 2 * layers, "head": 1}
    operations |= {"predictor": 2 * layers} if num_rows["predictor"] else {}
    dense = machine.dense_bytes_per_s if is_large else machine.cached_bytes_per_s
    sparse = machine.sparse_bytes_per_s if is_large else machine.cached_bytes_per_s
    beyond = {
        part: num_bytes[part] / dense + (0.0 if is_large else num_rows[part] * machine.dense_row_s)
        for part in ("attention", "head", "predictor")
    }
    beyond["neurons"] = num_bytes["neurons"] / sparse + num_rows["neurons"] * machine.row_s
    num_rows["gates"] = 60.0 * scale
    if every_gate:
        beyond["neurons"] += 60.0 * scale * row_bytes * (1 / machine.gates_bytes_per_s - 1 / sparse)
    beyond["KV cache"] = layers * machine.attend_s + touched.kv_cache / dense + looked_at * machine.attention_value_s
    seconds = {part: count * machine.operation_s + beyond.get(part, 0.0) for part, count in operations.items()}
    wall_s = machine.token_s + sum(value for part, value in seconds.items() if part != "begin")
    return Timed(touched, num_rows, seconds, operations, wall_s, looked_at)


def four(machine=MACHINE):
    small = (timed(1, row_bytes=96, machine=machine), timed(5, row_bytes=600, machine=machine))
    large = [timed(500, row_bytes=2400, is_large=True, every_gate=every, machine=machine) for every in (False, True)]
    return *small, *large


@pytest.mark.parametrize(
    "changes", [{}, {"row_s": 0.0}, {"dense_row_s": 0.0}, {"attention_value_s": 0.0}, {"attend_s": 0.0}], ids=str
)
def test_timings_that_follow_the_model_give_its_constants_back(changes):
    machine = replace(MACHINE, **changes)
    found = fitted(Q4, 3, *four(machine))
    assert astuple(found)[:3] == astuple(machine)[:3]
    assert astuple(found)[3:] == pytest.approx(astuple(machine)[3:], rel=1e-6, abs=1e-13)


def test_timings_that_make_no_sense_still_give_speeds():
    """As noise may: the larger models are the faster ones."""
    tiny, *larger = four()
    backwards = [
        replace(each, seconds={part: value / 1e4 for part, value in each.seconds.items()}, wall_s=0.0)
        for each in larger
    ]
    found = fitted(Q8, 1, tiny, *backwards)
    assert found.row_format == Q8
    assert found.operation_s > 0
    assert min(found.dense_bytes_per_s, found.sparse_bytes_per_s, found.gates_bytes_per_s) > 0
    assert 0 < found.cached_bytes_per_s <= 1 / LEAST_PER_BYTE_S
    assert min(found.attention_value_s, found.token_s, found.row_s, found.dense_row_s) >= 0


def test_a_cost_that_would_be_negative_is_none():
    rows = [[1.0, 2.0], [1.0, 4.0], [1.0, 6.0]]
    assert nonnegative_fit(rows, [5.0, 9.0, 13.0], [1.0] * 3) == pytest.approx([1.0, 2.0])
    costs = nonnegative_fit(rows, [6.0, 4.0, 2.0], [1.0] * 3)  # exactly 8 - a unit of the second column
    assert costs[1] == 0.0
    assert 2.0 < costs[0] < 6.0


@pytest.mark.parametrize(("rank", "mode"), [(0, "gate"), (64, "mask"), (64, "gate")])
def test_a_model_is_timed_by_part(rank, mode, lone_team, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "NUM_TOKENS", 4)
    monkeypatch.setattr(module, "DEPTH", 8)
    layers, neurons = 2, 256
    manifest, weights = module._random_weights(model_shape(128, neurons, layers, rank), Q4, tmp_path)
    assert mode in modes_of(manifest)
    model = CalibrationModel(manifest, Decoder(manifest.config, weights, mode, lone_team))
    found = model.timed([model.round() for _ in range(2)])
    masks = mode == "mask"
    assert found.operations["attention"] == 3 * layers  # keys have finer rows, which are projected apart
    assert found.operations.get("predictor", 0) == (2 * layers if masks else 0)
    assert set(found.seconds) == set(found.operations)
    assert min(found.seconds.values()) > 0
    assert sum(found.seconds.values()) < found.wall_s
    assert found.num_rows["attention"] == layers * 128 * 2.5
    assert found.num_rows["predictor"] == (layers * (rank + neurons) if masks else 0)
    assert 0 < found.num_rows["neurons"] <= 3 * layers * neurons
    assert (found.num_rows["gates"] == layers * neurons) != masks  # every gate is read, or named ones
    assert (found.touched.predictor > 0) == masks
    assert found.looked_at == layers * 128 * (8 + 2.5)


@pytest.mark.slow
def test_this_machine_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "NUM_ROUNDS", 2)
    found = module.measure_kernel_speeds(Q4, 1, tmp_path)
    assert found.row_format == Q4
    assert found.num_threads == 1
    assert found.operation_s > 0
    assert 1e8 < found.sparse_bytes_per_s < 1e12
    assert 1e8 < found.dense_bytes_per_s < 1e12
    assert 1e8 < found.gates_bytes_per_s < 1e12
