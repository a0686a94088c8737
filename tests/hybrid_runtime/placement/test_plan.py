"""make_plan on models that are only a manifest, and the files it is kept in."""

import json
import re
from dataclasses import asdict, replace

import pytest
import torch

from hybrid_runtime.benchmarking.bytes_touched import NeuronRows
from hybrid_runtime.errors import BudgetError, CheckpointError
from hybrid_runtime.placement.costs import layer_costs
from hybrid_runtime.placement.parts import GPU_OVERHEAD_BYTES, model_parts
from hybrid_runtime.placement.plan import (
    PLAN,
    TIER_CODES,
    TIERS,
    make_plan,
    read_plan,
    save_plan,
)
from hybrid_runtime.placement.reads import Reading, expected_reads
from hybrid_runtime.placement.requests import PlanRequest, TokenCosts
from hybrid_runtime.placement.starts import least_cache_bytes

from .made_up import (
    DIGEST,
    GPU,
    NUM_TOKENS,
    Q4,
    conditions_of,
    config_of,
    manifest_of,
    mixture_of,
    profile_of,
    speeds_of,
)

PROGRAM_BYTES = 1 << 20
NUM_POSITIONS = 64
CPU_S = {"embedding": 1e-6, "attention": 30e-6, "KV cache": 6e-6, "head": 8e-6, "predictors": 2e-6}
GPU_S = {"attention": 3e-6, "KV cache": 1e-6, "head": 2e-6, "predictors": 1e-6}
# a GPU that is worth its merge even for 96 neurons
COSTS = replace(
    layer_costs(manifest_of(config_of()), speeds_of(), conditions_of(), NeuronRows(100, 20, 20), GPU),
    sync_s=1e-7,
    hidden_sync_s=1e-7,
    none_sync_s=0.0,
    all_gpu_sync_s=1e-7,
)
MODELS = {
    "dense": config_of(),
    "mixture": mixture_of(),
    "predictors": config_of(predictor_input="post_norm"),
    "12-layers": config_of(num_hidden_layers=12),
}


def request_of(vram_bytes=0, ram_bytes=1 << 30, *, allow_disk=True):
    return PlanRequest(vram_bytes, ram_bytes, NUM_POSITIONS, "f16", PROGRAM_BYTES, allow_disk)


def planned(config, request, shares=None, beside_gpu=COSTS, gpu_s=GPU_S):
    profile = profile_of(config, shares)
    reads = expected_reads(profile, config, Reading(None, 1.0))
    layers = config.num_hidden_layers
    costs = TokenCosts(CPU_S, gpu_s, (COSTS,) * layers, (beside_gpu,) * layers, NUM_POSITIONS / 2)
    return make_plan(manifest_of(config), profile, reads, request, costs, GPU.name, None)


def dense_bytes(config):
    """Of everything but neurons, and of that the embedding."""
    parts = model_parts(manifest_of(config), NUM_POSITIONS, "f16", None)
    return sum(part.num_bytes for part in parts), sum(part.num_bytes for part in parts if part.kind == "embedding")


def neuron_bytes(config):
    return 3 * Q4.row_bytes(config.hidden_size) * config.intermediate_size * max(1, config.num_experts)


def least_cache(config):
    """Of RAM, where neurons are on disk."""
    return least_cache_bytes(config, 3 * Q4.row_bytes(config.hidden_size))


def budgets(config):
    """Ample, tight and much too little, with all the rest on the GPU, some of it, or none."""
    total, embedding = dense_bytes(config)
    cache = least_cache(config)
    neurons = neuron_bytes(config) * config.num_hidden_layers
    for vram in (
        0,
        GPU_OVERHEAD_BYTES,
        *(GPU_OVERHEAD_BYTES + total - embedding + neurons * i // 4 for i in (0, 1, 3)),
    ):
        for share in (0.3, 1.5):
            yield request_of(vram, PROGRAM_BYTES + total + cache + int(neurons * share))
    for vram in (0, GPU_OVERHEAD_BYTES + total // 2):
        yield request_of(vram, PROGRAM_BYTES + total + cache)


@pytest.mark.parametrize("name", MODELS)
def test_tiers_are_what_the_plan_counts_and_the_budgets_hold_them(name):
    config = MODELS[name]
    experts, row = max(1, config.num_experts), Q4.row_bytes(config.hidden_size)
    for request in budgets(config):
        plan, tiers = planned(config, request)
        assert [layer.layer_idx for layer in plan.layers] == list(range(config.num_hidden_layers))
        counted = dict.fromkeys(TIER_CODES, 0)
        down_rows = 0
        for layer, of_layer in zip(plan.layers, tiers, strict=True):
            assert of_layer.dtype == torch.uint8
            assert of_layer.shape == (experts, config.intermediate_size)
            counts = {tier: int((of_layer == code).sum()) for tier, code in TIER_CODES.items()}
            assert counts == {"gpu": layer.gpu_neurons, "ram": layer.ram_neurons, "disk": layer.disk_neurons}
            assert sum(counts.values()) == of_layer.numel()
            for tier, count in counts.items():
                counted[tier] += count
            down_rows += counts["ram"] if layer.merge == "hidden" else 0
        on = {"gpu": 0, "ram": 0}
        for part in plan.parts:
            on[part.device] += part.num_bytes
        assert sum(on.values()) == dense_bytes(config)[0]
        in_vram = on["gpu"] + counted["gpu"] * 3 * row + down_rows * row
        assert plan.vram_used_bytes == (in_vram + GPU_OVERHEAD_BYTES if in_vram else 0) <= request.vram_bytes
        in_ram = on["ram"] + counted["ram"] * 3 * row + plan.cache_bytes
        assert plan.ram_used_bytes == PROGRAM_BYTES + in_ram <= request.ram_bytes
        assert plan.cache_bytes == 0 if counted["disk"] == 0 else plan.cache_bytes >= least_cache(config)
        assert plan.disk_used_bytes == counted["disk"] * 3 * row


def test_seconds_add_up():
    for request in budgets(MODELS["dense"]):
        plan, _ = planned(MODELS["dense"], request)
        assert plan.total_s == pytest.approx(plan.neurons_s + sum(part.seconds for part in plan.parts))
        assert plan.tokens_per_s == pytest.approx(1 / plan.total_s)
        assert plan.greedy_s is None or plan.greedy_s >= plan.neurons_s * (1 - plan.gap) * (1 - 1e-9)
    on_cpu, _ = planned(MODELS["dense"], request_of())
    assert sum(part.seconds for part in on_cpu.parts) == pytest.approx(sum(CPU_S.values()) - CPU_S["predictors"])
    on_gpu, _ = planned(MODELS["dense"], request_of(8 << 30))
    rest = sum(part.seconds for part in on_gpu.parts)
    assert rest == pytest.approx(sum(GPU_S.values()) - GPU_S["predictors"] + CPU_S["embedding"])
    assert on_gpu.total_s < on_cpu.total_s


def test_parts_stay_where_they_are_quicker():
    """All three ways to share VRAM are tried: a GPU that is slower at everything but neurons gets neurons alone."""
    config, slow = MODELS["predictors"], dict.fromkeys(GPU_S, 1.0)
    plan, _ = planned(config, request_of(8 << 30), gpu_s=slow)
    assert {part.device for part in plan.parts} == {"ram"}
    assert sum(layer.gpu_neurons for layer in plan.layers) > 0
    plan, _ = planned(config, request_of(8 << 30), gpu_s=GPU_S | {"head": 1.0})
    assert {part.kind for part in plan.parts if part.device == "ram"} == {"head", "embedding"}
    _, embedding = dense_bytes(config)  # RAM that has no room for what is quicker there
    plan, _ = planned(config, request_of(8 << 30, PROGRAM_BYTES + embedding), gpu_s=slow)
    assert {part.kind for part in plan.parts if part.device == "ram"} == {"embedding"}


def test_attention_stays_with_the_neurons_where_crossing_costs_more_than_it_gains():
    config = MODELS["dense"]
    total, embedding = dense_bytes(config)
    vram = request_of(GPU_OVERHEAD_BYTES + total - embedding)  # no neuron fits beside the rest
    assert {part.device for part in planned(config, vram)[0].parts if part.kind == "attention"} == {"gpu"}
    dear = replace(COSTS, none_sync_s=1e-3, sync_s=1e-3, hidden_sync_s=1e-3)
    plan, _ = planned(config, vram, beside_gpu=dear)
    assert {part.device for part in plan.parts} == {"ram"}
    assert plan.total_s < 1e-3


def test_a_reserve_stays_free():
    config = MODELS["dense"]
    request = request_of(0, PROGRAM_BYTES + dense_bytes(config)[0] + neuron_bytes(config) * 2)
    plan, _ = planned(config, request)
    reserved = neuron_bytes(config) // 2
    kept, _ = planned(config, replace(request, reserved_bytes=reserved))
    assert kept.ram_used_bytes <= request.ram_bytes - reserved < plan.ram_used_bytes
    with pytest.raises(BudgetError, match=r"which is 1 bytes more"):
        planned(config, replace(request, reserved_bytes=4 * reserved + 1))


def test_neurons_that_fire_most_get_the_gpu():
    config = MODELS["dense"]
    total, embedding = dense_bytes(config)
    half = neuron_bytes(config) * config.num_hidden_layers // 2
    plan, tiers = planned(config, request_of(GPU_OVERHEAD_BYTES + total - embedding + half))
    assert 0 < sum(layer.gpu_neurons for layer in plan.layers) < config.num_hidden_layers * config.intermediate_size
    numbers = torch.arange(config.intermediate_size)  # the profile has neurons in the order of how often they fire
    for of_layer in tiers:  # whole groups fill the room, so that single ones may be out of order
        assert numbers[of_layer[0] == 0].double().mean() < numbers[of_layer[0] == 1].double().mean() - 30


def test_twelve_layers_stay_in_the_order_of_their_numbers(tmp_path):
    config = MODELS["12-layers"]
    shares = [0.9 if idx % 2 else 0.001 * idx for idx in range(12)]  # layer 10 beside 1, were they sorted as text
    total, embedding = dense_bytes(config)
    request = request_of(GPU_OVERHEAD_BYTES + total - embedding + neuron_bytes(config) * 5)
    plan, tiers = planned(config, request, shares)
    save_plan(tmp_path, plan, tiers)
    read, again = read_plan(tmp_path, config)
    assert read == plan
    for idx, (ours, theirs) in enumerate(zip(tiers, again, strict=True)):
        assert torch.equal(ours, theirs), idx
    hot = [layer.gpu_neurons for layer in read.layers]
    assert min(hot[1::2]) > max(hot[::2]), hot


@pytest.mark.parametrize("name", MODELS)
def test_a_byte_too_little_is_refused_with_the_numbers(name):
    config = MODELS[name]
    total, embedding = dense_bytes(config)
    neurons = neuron_bytes(config) * config.num_hidden_layers
    vram = GPU_OVERHEAD_BYTES + total - embedding
    for vram_bytes, dense in ((0, total), (vram, embedding)):
        held = PROGRAM_BYTES + dense
        with pytest.raises(BudgetError, match=r"--ram .*: the program takes 1\.00 MiB .* which is 1 bytes more"):
            planned(config, request_of(vram_bytes, held - 1))
        least = held + least_cache(config)
        assert planned(config, request_of(vram_bytes, least))[0].ram_used_bytes == least
        with pytest.raises(BudgetError, match=r"--ram .*: reading neurons from disk .* which is 1 bytes too few"):
            planned(config, request_of(vram_bytes, least - 1))
        ample = held + neurons
        plan, _ = planned(config, request_of(vram_bytes, ample, allow_disk=False))
        assert plan.disk_used_bytes == 0
        assert plan.ram_used_bytes <= ample
        with pytest.raises(BudgetError, match=rf"the neurons need .*{neurons} bytes.* which is 1 bytes too few"):
            planned(config, request_of(vram_bytes, ample - 1, allow_disk=False))


@pytest.fixture
def saved(tmp_path):
    plan, tiers = planned(MODELS["mixture"], request_of(8 << 30, 1 << 22))
    save_plan(tmp_path / "new" / "plan", plan, tiers)
    return tmp_path / "new" / "plan", plan, tiers


def test_what_was_saved_is_read(saved):
    folder, plan, tiers = saved
    assert sorted(path.name for path in folder.iterdir()) == [PLAN, TIERS]
    read, again = read_plan(folder, MODELS["mixture"], DIGEST)
    assert read == plan
    assert read.profile_tokens == NUM_TOKENS
    assert all(torch.equal(*pair) for pair in zip(tiers, again, strict=True))
    assert json.loads((folder / PLAN).read_text())["layers"] == json.loads(json.dumps(asdict(plan)))["layers"]


def edited(**values):
    def edit(folder):
        path = folder / PLAN
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def without_a_layer(folder):
    values = json.loads((folder / PLAN).read_text())
    edited(layers=values["layers"][:-1])(folder)


def layers_swapped(folder):
    values = json.loads((folder / PLAN).read_text())
    edited(layers=values["layers"][::-1])(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / PLAN).unlink(), r"has no plan\.json"),
        (lambda folder: (folder / PLAN).write_bytes(b"\xff"), r"plan\.json is not UTF-8"),
        (lambda folder: (folder / PLAN).write_text("[]"), r"plan\.json is a JSON list"),
        (edited(format="x"), r"plan\.json: is 'x' version 3, expected 'hybrid-runtime plan' version 3"),
        (edited(version=1), "version 1, expected"),
        (edited(gap="none"), r"plan\.json\.gap is 'none', expected float"),
        (edited(more=1), r"has unknown \['more'\]"),
        (without_a_layer, r"plan\.json: has layers \[0, 1\], expected 0 to 2"),
        (layers_swapped, r"plan\.json: has layers \[2, 1, 0\], expected 0 to 2"),
        (lambda folder: (folder / TIERS).unlink(), r"tiers\.safetensors: is missing"),
        (lambda folder: (folder / TIERS).write_bytes(b"x" * 9), r"tiers\.safetensors: cannot be read as safetensors"),
    ],
    ids=["none", "bytes", "list", "format", "version", "type", "field", "layer", "order", "no-tiers", "tiers"],
)
def test_damaged_files_are_refused_by_name(saved, spoil, message):
    folder, _, _ = saved
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as refused:
        read_plan(folder, MODELS["mixture"], DIGEST)
    assert str(folder) in str(refused.value)
    assert str(refused.value).endswith("run hybrid-place again")


def test_files_of_other_models_are_refused_by_name(saved):
    folder, _, tiers = saved
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(folder / PLAN))}: is of another store of made-up"):
        read_plan(folder, MODELS["mixture"], "1" * 64)
    for config in (mixture_of(num_hidden_layers=2), mixture_of(num_experts=5), mixture_of(intermediate_size=95)):
        with pytest.raises(CheckpointError, match="run hybrid-place again"):
            read_plan(folder, config)
    plan, _ = read_plan(folder, MODELS["mixture"])
    for wrong in ([1 - each.clamp(max=1) for each in tiers], [torch.full_like(each, 7) for each in tiers]):
        save_plan(folder, plan, wrong)
        with pytest.raises(CheckpointError, match=r"tiers\.safetensors: layer 0 is not as plan\.json has it"):
            read_plan(folder, MODELS["mixture"])
