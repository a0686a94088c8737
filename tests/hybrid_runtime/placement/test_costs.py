"""What a placement weighs adds up to the prediction, and follows from the machine's speeds by hand."""

from dataclasses import asdict, replace

import pytest

from hybrid_kernels.activation import Activation
from hybrid_runtime.benchmarking.bytes_touched import NeuronRows
from hybrid_runtime.placement.costs import cpu_part_seconds, gpu_part_seconds, layer_costs
from hybrid_runtime.placement.decode_time import predict_decode_time, token_bytes

from .made_up import GPU, Q4, conditions_of, config_of, manifest_of, mixture_of, speeds_of

DENSE = manifest_of(config_of())
MIXTURE = manifest_of(mixture_of(predictor_input="post_norm"))
LAYERS = 3
PREDICTED = conditions_of(NeuronRows(90, 60, 60), every_gate=False, uses_predictor=True)
ALIKE = NeuronRows(30, 30, 30)  # every bundle of these is read whole
GPU_BOTH_WAYS = replace(GPU, from_gpu_bytes_per_s=5e9)
WAY_THERE, WAY_BACK, LAUNCHES, OPERATIONS = 64 * 4 / 20e9, 64 * 4 / 5e9, 3 * 2e-6, 2 * 4e-6


def costs_of(rows=ALIKE, gpu=None, manifest=DENSE, conditions=PREDICTED, **named):
    return layer_costs(manifest, speeds_of(), conditions, rows, gpu, **named)


@pytest.mark.parametrize(
    ("manifest", "conditions"),
    [
        (DENSE, conditions_of()),
        (MIXTURE, PREDICTED),
        (DENSE, conditions_of(NeuronRows(288, 288, 288), every_row=True)),
    ],
)
def test_parts_and_layers_come_to_the_prediction(manifest, conditions):
    time = predict_decode_time(manifest, speeds_of(), conditions)
    assert time.total_s == pytest.approx(sum(asdict(time).values()))
    shares = (0.5, 0.3, 0.2)
    layers = [NeuronRows(*(kind * share for kind in asdict(conditions.rows).values())) for share in shares]
    total = sum(cpu_part_seconds(time).values())
    for rows in layers:
        costs = costs_of(rows, manifest=manifest, conditions=conditions)
        total += costs.cpu_s * (rows.gate + rows.up + rows.down) / 3 + costs.none_sync_s
    assert total == pytest.approx(time.total_s)


def test_costs_without_a_gpu_have_none():
    costs = costs_of()
    bundle = 3 * Q4.row_bytes(64)
    assert costs.cpu_s == pytest.approx(bundle / 8e9 + 3 * 8e-9)
    assert costs.cpu_without_down_s == pytest.approx(costs.cpu_s * 2 / 3)
    assert costs.disk_s == pytest.approx(1 / 50_000)  # a page or two hold it, and one read brings them
    assert costs.gpu_s == costs.gpu_down_s == 0
    assert costs.none_sync_s == pytest.approx(OPERATIONS)
    assert asdict(costs_of(NeuronRows(0, 0, 0))) == pytest.approx(asdict(costs))


def test_down_rows_count_by_their_share_of_what_is_read():
    """Where all gates are read, one row in thirty is a down row: merging before it spares the CPU next to nothing."""
    rows = NeuronRows(280, 10, 10)
    every_gate = conditions_of(NeuronRows(280, 10, 10))
    costs = costs_of(rows, GPU, conditions=every_gate)
    assert costs.cpu_without_down_s == pytest.approx(costs.cpu_s * 29 / 30 + 0.1 * 8 / 20e9)
    assert costs.gpu_down_s == pytest.approx(0.1 * Q4.row_bytes(64) / 400e9)
    assert costs.gpu_s == pytest.approx(3 * Q4.row_bytes(64) / 400e9)


def test_both_sides_wait_for_what_crosses_the_bus():
    cpu = costs_of()
    beside_cpu, beside_gpu = (costs_of(gpu=GPU_BOTH_WAYS, attention_on_gpu=on_gpu) for on_gpu in (False, True))
    for costs in (beside_cpu, beside_gpu):
        assert (costs.cpu_s, costs.disk_s) == (cpu.cpu_s, cpu.disk_s)
        assert costs.cpu_without_down_s == pytest.approx(cpu.cpu_without_down_s + 8 / 20e9)
        assert costs.sync_s == pytest.approx(OPERATIONS + LAUNCHES + 10e-6 + WAY_THERE + WAY_BACK)
    assert beside_cpu.none_sync_s == pytest.approx(OPERATIONS)
    assert beside_gpu.none_sync_s == pytest.approx(OPERATIONS + 10e-6 + WAY_THERE + WAY_BACK)
    assert beside_cpu.all_gpu_sync_s == pytest.approx(LAUNCHES + 10e-6 + WAY_THERE + WAY_BACK)
    assert beside_gpu.all_gpu_sync_s == pytest.approx(LAUNCHES)
    assert beside_cpu.hidden_sync_s == pytest.approx(beside_cpu.sync_s)
    assert beside_gpu.hidden_sync_s == pytest.approx(beside_gpu.sync_s - WAY_THERE)


def test_models_without_a_gate_have_two_rows():
    ungated = manifest_of(config_of(activation=Activation("relu")))
    costs = costs_of(NeuronRows(0, 30, 30), GPU, ungated)
    assert costs.gpu_s == pytest.approx(2 * Q4.row_bytes(64) / 400e9)
    assert costs.cpu_without_down_s == pytest.approx(costs.cpu_s / 2 + 8 / 20e9)
    assert asdict(costs_of(NeuronRows(0, 0, 0), GPU, ungated)) == pytest.approx(asdict(costs))


def test_large_bundles_are_read_from_disk_at_its_speed():
    large = manifest_of(config_of(hidden_size=16384, num_attention_heads=128, head_dim=128))
    bundle = 3 * Q4.row_bytes(16384)
    disk_s = costs_of(manifest=large).disk_s
    assert bundle / 1e9 < disk_s < (bundle + 4096) / 1e9  # of the pages that it lies on
    assert disk_s > 1 / 50_000


def test_parts_on_the_gpu_cost_their_bytes_and_launches():
    touched = token_bytes(MIXTURE, PREDICTED)
    free = replace(GPU, launch_s=0.0, round_trip_s=0.0, from_gpu_bytes_per_s=1e30)
    fast = gpu_part_seconds(touched, MIXTURE, free)
    assert set(fast) == {"attention", "KV cache", "head", "predictors"}
    assert sum(fast.values()) == pytest.approx((touched.total - touched.neurons - touched.embedding) / 400e9)
    with_launches = gpu_part_seconds(touched, MIXTURE, replace(free, launch_s=2e-6))
    assert sum(with_launches.values()) - sum(fast.values()) == pytest.approx((2 * 3 * LAYERS + 1) * 2e-6)
    with_logits = gpu_part_seconds(touched, MIXTURE, replace(free, round_trip_s=1e-5, from_gpu_bytes_per_s=1e9))
    assert with_logits["head"] - fast["head"] == pytest.approx(1e-5 + 256 * 4 / 1e9)
