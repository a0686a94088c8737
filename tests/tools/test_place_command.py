"""hybrid-place on small profiled stores, with a machine's speeds that are made up."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hybrid_runtime.budget import MemoryNeeds, plan_memory
from hybrid_runtime.placement import planning
from hybrid_runtime.placement.decode_time import predict_decode_time
from hybrid_runtime.placement.plan import PLAN, read_plan
from hybrid_runtime.placement.sampled_ratios import sampled_ratios
from hybrid_runtime.profiling.profile_file import read_samples
from hybrid_runtime.sizes import parse_bytes
from hybrid_runtime.speeds import machine_speeds as speeds_module
from hybrid_runtime.store.manifest import read_manifest
from hybrid_runtime.store.reader import Store
from hybrid_tools import place
from hybrid_tools.convert import main as convert
from hybrid_tools.place import WHAT_IF_GIB, main
from hybrid_tools.profile import main as profile
from tests.hybrid_runtime.placement.made_up import F32, kernel_of, speeds_of
from tests.hybrid_runtime.small_models import LLAMA, TURBOSPARSE, write_model

DENSE = LLAMA | {"architectures": ["BambooForCausalLM"], "model_type": "bamboo", "hidden_act": "relu"}
TEXT = "Hello world, once upon a time there was a neuron and the others and a layer. " * 40


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A dense model and a mixture with its own predictors, as stores with profiles; one without a profile."""
    folder = tmp_path_factory.mktemp("stores")
    (folder / "text").write_text(TEXT)
    for name, config in (("dense", DENSE), ("mixture", TURBOSPARSE)):
        write_model(folder / f"{name}-checkpoint", config)
        assert convert([str(folder / f"{name}-checkpoint"), "-o", str(folder / name)]) == 0
        options = ["--text", str(folder / "text"), "--window", "64", "--tokens", "1024", "--threads", "1"]
        assert profile([str(folder / name), *options]) == 0
    return folder


@pytest.fixture
def asked(monkeypatch):
    """Stands in for measuring; what was asked for."""
    calls = []

    def machine_speeds(machine, row_format, num_threads, cache_dir, say):
        calls.append((row_format, num_threads, cache_dir))
        return speeds_of()

    monkeypatch.setattr(planning, "machine_speeds", machine_speeds)
    monkeypatch.setattr(speeds_module, "speed_now", lambda _: None)
    return calls


@pytest.fixture
def run(asked, capsys, tmp_path):
    def run(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in (*arguments, "--cache-dir", tmp_path / "cache")])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


@pytest.fixture(params=["dense", "mixture"])
def model(request, stores):
    return stores / request.param


def num_neurons(config):
    return config.intermediate_size * config.num_hidden_layers * max(1, config.num_experts)


def test_without_a_gpu_all_is_in_ram(run, model, tmp_path):
    code, out, err = run(model, "--ram", "4G", "-o", tmp_path / "plan", "--threads", "1")
    assert (code, err) == (0, [])
    lines = out.splitlines()
    assert lines[-1] == str(tmp_path / "plan")
    assert re.fullmatch(rf"{model.name}-checkpoint: [\d.]+ tokens/s predicted, [\d.]+ ms a token", lines[0])
    assert lines[1] == ("GPU: none; context 512 tokens, of which a token looks back on 256; keys and values in f32")
    assert re.fullmatch(r"VRAM +0 B +0 B +0 B", lines[4]), lines[4]
    assert re.fullmatch(r"RAM +4\.00 GiB +[\d.]+ [MG]iB +[\d.]+ GiB", lines[5]), lines[5]
    config = read_manifest(model).config
    plan, tiers = read_plan(tmp_path / "plan", config)
    assert all((each == 1).all() for each in tiers)
    layers = [line.split() for line in lines[lines.index(next(x for x in lines if x.startswith("layer "))) + 1 :][:2]]
    for line, layer in zip(layers, plan.layers, strict=True):
        assert line[:5] == [str(layer.layer_idx), "none", "0", str(layer.ram_neurons), "0"]
    parts = {part.kind for part in plan.parts}
    assert parts == {"embedding", "attention", "KV cache", "head"} | ({"predictors"} if config.num_experts else set())
    for part in plan.parts:
        assert any(line.startswith(f"{part.kind:12} {part.device}") for line in lines)
    neurons = next(line.split() for line in lines if line.startswith("neurons"))
    assert neurons[1:3] == ["ram", f"{num_neurons(config) * 3 * 32 * 4 / 1024:.2f}"]
    assert re.fullmatch(
        r"solved in [\d.]+ s \(.*\): neurons [\d.]+ ms, of which a better placement would save at most 0\.\d\d %; "
        r"greedy: [\d.]+ ms, [\d.]+ % more",
        lines[-2],
    )


def test_the_plan_comes_to_the_predicted_time(run, model, monkeypatch, tmp_path):
    planners = []
    made = planning.make_planner
    monkeypatch.setattr(
        planning, "make_planner", lambda *args, **named: planners.append(made(*args, **named)) or planners[0]
    )
    code, out, _ = run(model, "--ram", "4G", "--json", "-o", tmp_path / "plan")
    assert code == 0
    (planner,) = planners
    time = predict_decode_time(planner.store.manifest, planner.speeds, planner.conditions)
    assert json.loads(out)["tokens_per_s"] == pytest.approx(time.tokens_per_s, rel=1e-6)


def test_a_gpu_by_its_data_sheet_gets_neurons(run, model, monkeypatch, tmp_path):
    slow = kernel_of(F32, dense_bytes_per_s=1e6, cached_bytes_per_s=1e6, sparse_bytes_per_s=1e6, gates_bytes_per_s=1e6)
    monkeypatch.setattr(planning, "machine_speeds", lambda *_: speeds_of(slow))  # such small models need no GPU
    options = ("--ram", "4G", "--gpu", "rtx-4060", "--json")
    code, out, err = run(model, "--vram", "8G", *options)
    assert (code, err) == (0, [])
    answer = json.loads(out)
    assert answer["gpu"] == "RTX 4060 8 GB"
    folder = Path(answer["folder"])
    assert folder.parent == model / "plans"
    assert re.fullmatch(r"vram-8192M-ram-4096M-ctx-512-[0-9a-f]{8}", folder.name)
    plan, tiers = read_plan(folder, read_manifest(model).config)
    assert answer["tokens_per_s"] == plan.tokens_per_s
    assert {part.device for part in plan.parts if part.kind != "embedding"} == {"gpu"}
    assert plan.vram_used_bytes > 600 << 20
    assert sum(int((each == 0).sum()) for each in tiers) == sum(layer["gpu_neurons"] for layer in answer["layers"])
    other = json.loads(run(model, "--vram", "8G", *options, "--gpu", "rtx-4090-laptop", "--no-disk")[1])
    assert other["folder"] != answer["folder"]  # one plan does not take another's place
    assert json.loads(run(model, "--vram", "8G", *options)[1])["folder"] == answer["folder"]
    without = json.loads(run(model, *options, "-o", tmp_path / "without")[1])
    assert {part["device"] for part in without["parts"]} == {"ram"}
    assert without["gpu"] != "RTX 4060 8 GB"


def test_what_takes_seconds_says_so(run, model, monkeypatch, tmp_path):
    monkeypatch.setattr(place, "MANY_NEURONS", 50)
    code, _, err = run(model, "--ram", "4G", "-o", tmp_path / "plan")
    assert code == 0
    assert err == [f"placing {num_neurons(read_manifest(model).config)} neurons, which takes some seconds ..."]


def test_memory_that_is_slower_than_it_was_is_told(run, model, monkeypatch, tmp_path):
    monkeypatch.setattr(speeds_module, "speed_now", lambda speeds: f"{speeds.cpu_name} is busy")
    code, _, err = run(model, "--ram", "4G", "-o", tmp_path / "plan")
    assert (code, err) == (0, [f"{speeds_of().cpu_name} is busy"])


def test_parts_and_what_is_beside_them_add_up_to_what_is_used(run, model, tmp_path):
    options = ("--ram", "4G", "--vram", "8G", "--gpu", "rtx-4060")
    _, out, _ = run(model, *options, "-o", tmp_path / "plan")
    used = json.loads((tmp_path / "plan" / PLAN).read_text())
    sums, rounded = {"gpu": 0, "ram": 0}, {"gpu": 0, "ram": 0}
    for line in out[out.index("part  ") : out.index("layer  ")].splitlines()[1:]:
        if found := re.search(r" (gpu|ram) +([0-9.]+) ([KMG]?)i?B", line):
            sums[found[1]] += parse_bytes(found[2] + found[3])
            rounded[found[1]] += parse_bytes(f"0.005{found[3]}") if found[3] else 0
    assert sums["ram"] == pytest.approx(used["ram_used_bytes"], abs=rounded["ram"])
    assert sums["gpu"] == pytest.approx(used["vram_used_bytes"], abs=rounded["gpu"])


def test_a_small_model_has_nothing_on_a_gpu(run, model, tmp_path):
    """Two thousand neurons are read from caches before a GPU has answered."""
    options = ("--ram", "4G", "--gpu", "rtx-4060", "--vram", "8G", "--json", "-o", tmp_path / "plan")
    answer = json.loads(run(model, *options)[1])
    assert {part["device"] for part in answer["parts"]} == {"ram"}
    assert answer["vram_used_bytes"] == 0
    assert {layer["merge"] for layer in answer["layers"]} == {"none"}


def test_what_if_shows_every_size_and_leaves_nothing(run, model, tmp_path):
    shutil.rmtree(model / "plans", ignore_errors=True)
    code, out, err = run(model, "--ram", "4G", "--gpu", "rtx-4060", "--what-if", "--png", tmp_path / "picture.png")
    assert (code, err) == (0, [])
    title, *rows = out.splitlines()
    assert title == "VRAM, GiB  tokens/s  ms a token  neurons in VRAM, %  on disk, %"
    assert [int(row.split()[0]) for row in rows] == list(WHAT_IF_GIB)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert not (model / "plans").exists()
    answer = json.loads(run(model, "--ram", "4G", "--gpu", "rtx-4060", "--what-if", "--json")[1])
    assert answer["model"] == f"{model.name}-checkpoint"
    assert [f"{row['tokens_per_s']:.2f}" for row in answer["rows"]] == [row.split()[1] for row in rows]


def test_without_any_gpu_it_says_so(run, stores, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run(stores / "dense", "--what-if", "--ram", "4G")
    assert code == 0
    assert len(out.splitlines()) == 2
    assert len(err) == 1
    assert re.fullmatch(r"no GPU to plan for \(torch.cuda.is_available.*\); --gpu NAME plans for one .*", err[0])
    code, out, err = run(stores / "dense", "--vram", "8G", "--ram", "4G", "--json", "-o", tmp_path / "plan")
    assert (code, len(err)) == (0, 1)
    assert json.loads(out)["vram_bytes"] == 0
    assert "is_available" in json.loads(out)["gpu"]


def test_too_little_ram_is_refused_with_the_numbers(run, model, tmp_path):
    found = json.loads(run(model, "--ram", "4G", "--json", "-o", tmp_path / "plan")[1])
    neurons = num_neurons(read_manifest(model).config) * 3 * 32 * 4
    least = found["ram_used_bytes"] - neurons  # the process may have grown since
    code, out, err = run(model, "--ram", str(least // 2), "-o", tmp_path / "other")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"hybrid-place: --ram [\d.]+ [MG]iB: the program takes [\d.]+ [MG]iB and "
                        r"what is not neurons .*, "
                        r"which is \d+ bytes more; give more --ram.*", err[-1])  # fmt: skip
    assert not (tmp_path / "other").exists()


def test_no_disk_refuses_what_only_the_disk_would_hold(run, stores, monkeypatch, tmp_path):
    model = stores / "dense"
    monkeypatch.setattr(planning, "current_rss_bytes", lambda: 200 << 20)
    plan = json.loads(run(model, "--ram", "4G", "--json", "-o", tmp_path / "plan")[1])
    needs = MemoryNeeds(0, plan["num_positions"], plan["kv_dtype"])
    memory = replace(plan_memory(read_manifest(model).config, needs, 200 << 20), kv_cache=0)
    in_ram = sum(each["num_bytes"] for each in plan["parts"]) + sum(each["ram_bytes"] for each in plan["layers"])
    used = replace(memory, weights=in_ram).total + 1  # what a run promises to stay below
    assert plan["ram_used_bytes"] == replace(memory, weights=in_ram).expected < used
    assert json.loads(run(model, "--ram", str(used), "--no-disk", "--json", "-o", tmp_path / "a")[1])[
        "disk_used_bytes"
    ] == 0  # fmt: skip
    code, out, err = run(model, "--ram", str(used - 2), "--no-disk")
    assert (code, out) == (2, "")
    assert re.search(r"the neurons need .* \(\d+ bytes\), VRAM leaves 0 bytes and RAM .*: which is [12] bytes too few|"
                     r"which is [12] bytes too few; give more --vram or --ram, allow the disk", err[-1])  # fmt: skip
    spilled = json.loads(run(model, "--ram", str(used - 2), "--json", "-o", tmp_path / "b")[1])
    assert spilled["disk_used_bytes"] > 0
    code, out, err = run(model, "--ram", str(used - 2), "--no-disk", "--what-if", "--gpu", "rtx-3060", "--json")
    assert code == 0
    assert json.loads(out)["rows"][0] == {"vram_gib": 0, "tokens_per_s": None}
    assert err[0].startswith("0 GiB: the neurons need")
    assert json.loads(out)["rows"][-1]["tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "rtx-1"), "--gpu rtx-1: expected one of rtx-2080ti, rtx-3060, "),
        (("--png", "a.png"), "--png is the picture of --what-if; give both"),
        (("--what-if", "-o", "plan"), "--what-if leaves no plan; leave --output out"),
        (("--what-if", "--vram", "1G"), "--what-if tries sizes of VRAM itself; leave --vram out"),
        (("--vram", "8X"), "--vram: size '8X': expected"),
        (("--gpu", "rtx-4060", "--vram", "9G"), "--vram 9.00 GiB: RTX 4060 8 GB has 8.00 GiB; give at most that"),
        (
            ("--gpu", "rtx-4060", "--vram", "600M"),
            "--vram 600.00 MiB: CUDA and buffers alone take 600.00 MiB; give more",
        ),
        (("--threads", "999"), "Invalid value for '--threads'"),
        (("--ctx", "0"), "Invalid value for '--ctx'"),
        (("--predictor", "mask"), "--predictor mask: this checkpoint carries no predictor"),
        (("--predictor", "trained"), "nobody has trained predictors for dense-checkpoint yet"),
        (("--nothing",), "No such option"),
        (("--profile", "none"), "none: has no profile of dense-checkpoint; run hybrid-profile"),
        (("--what-if", "--png", "none/a.png"), "none/a.png: No such file or directory"),
        (("--what-if", "--png", "a.words"), "--png a.words: "),
        (("--kv-cache", "q8"), "--kv-cache q8: head_dim 8 is not a multiple of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options_are_refused_in_a_line(run, stores, arguments, message, asked, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(stores / "dense", "--ram", "4G", *arguments)
    assert code == 2
    assert err[-1].startswith("hybrid-place: ")
    assert message in err[-1]
    if arguments[0] != "--what-if" and "rtx-4060" not in arguments:
        assert asked == []  # refused before anything is measured


def test_a_model_that_is_not_there_or_not_profiled_is_refused(run, stores, tmp_path):
    code, _, err = run(tmp_path / "none", "--ram", "4G")
    assert code == 2
    shutil.copytree(stores / "dense", tmp_path / "bare", ignore=shutil.ignore_patterns("profile", "plans"))
    code, _, err = run(tmp_path / "bare", "--ram", "4G")
    assert code == 2
    assert f"has no profile of dense-checkpoint; run hybrid-profile {tmp_path / 'bare'} --text FILE" in err[-1]
    code, _, err = run(tmp_path / "bare", "--ram", "4G", "--profile", stores / "dense" / "profile")
    assert code == 0, err
    code, _, err = run(tmp_path / "bare", "--ram", "4G", "--profile", stores / "mixture" / "profile")
    assert code == 2
    assert "is of mixture-checkpoint" in err[-1]


def test_predictors_are_left_out_where_decoding_leaves_them_out(run, stores, tmp_path):
    found = {}
    for mode in (None, "mask", "off"):
        options = () if mode is None else ("--predictor", mode)
        code, out, err = run(stores / "mixture", "--ram", "4G", *options, "--json", "-o", tmp_path / str(mode))
        assert code == 0, err
        parts = {part["kind"]: part["seconds"] for part in json.loads(out)["parts"]}
        found[mode] = parts["predictors"], json.loads(out)["tokens_per_s"]
    assert found[None] == found["mask"]
    assert found["mask"][0] > 0
    assert found["off"][0] == 0
    assert found["off"][1] != found["mask"][1]


def test_measured_gates_are_at_least_one_for_one(stores):
    for name in ("dense", "mixture"):
        store = Store(stores / name, read_manifest(stores / name))
        assert 1 <= sampled_ratios(store, stores / name / "profile").gates_for_one < 10


def test_what_own_predictors_name_is_counted(stores):
    store = Store(stores / "mixture", read_manifest(stores / "mixture"))
    config, checkpoint = store.manifest.config, stores / "mixture-checkpoint"
    weights = {}
    for file in checkpoint.glob("*.safetensors"):
        weights |= load_file(file)
    named = fired = 0
    for layer_idx in range(config.num_hidden_layers):
        sample = read_samples(stores / "mixture" / "profile", config, layer_idx)
        inputs, active = sample.of_expert(0, config.intermediate_size)
        (fc1,) = (value for name, value in weights.items() if is_predictors(name, layer_idx, "fc1"))
        (fc2,) = (value for name, value in weights.items() if is_predictors(name, layer_idx, "fc2"))
        named += int((torch.relu(inputs[:64] @ fc1.T) @ fc2.T > 0).sum())
        fired += int(active[:64].sum())
    assert fired > 100
    found = sampled_ratios(store, stores / "mixture" / "profile").named_for_one
    assert found == pytest.approx(named / fired, rel=0.01)
    assert found > 1


def is_predictors(name, layer_idx, matrix):
    """Of the layer's first expert."""
    return f".{layer_idx}." in name.split("experts")[0] and ".experts.0." in name and f"predictor.{matrix}" in name


def test_what_has_to_be_assumed_is_said(run, stores, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    gates = "the profile has no sample of what gates read: assuming that 2.0 fire for a neuron that does"
    named = "nothing says how many neurons the predictors name: assuming 1.3 for one that fires"
    for name, lines in (("dense", [gates]), ("mixture", [named, gates])):
        options = ("--text", tmp_path / "text", "--window", "64", "--tokens", "512", "--samples", "0", "--threads", "1")
        assert profile([str(option) for option in (stores / name, *options, "-o", tmp_path / name)]) == 0
        code, _, err = run(stores / name, "--ram", "4G", "--profile", tmp_path / name, "-o", tmp_path / f"{name}-plan")
        assert (code, err) == (0, lines)


def test_help_names_units_and_defaults(capsys):
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--vram SIZE GPU memory to use, e.g. 8G. [default: 0]", "[default: what is free]",
                  "Context in tokens. [default: as hybrid-", "by its data sheet: rtx-4060", "[default: disk]",
                  "0 to 24 GiB", "[default: with the model's store]"):  # fmt: skip
        assert words in text, words
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("hybrid-place")
