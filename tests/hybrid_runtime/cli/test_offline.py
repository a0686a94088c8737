"""hybrid-run --vram profiles and plans a sparse model once, and leaves everything else as it is."""

import io
import json
import re
from dataclasses import replace

import pytest

from hybrid_runtime.cli import offline
from hybrid_runtime.cli.run import main
from hybrid_runtime.placement import planning
from hybrid_runtime.placement.plan import PLAN, TIERS
from hybrid_runtime.profiling.profile_file import PROFILE
from hybrid_tools.convert import main as convert

from ..placement.made_up import speeds_of  # noqa: TID252  # absolute names are the runtime's
from ..small_models import LLAMA, TURBOSPARSE, write_model  # noqa: TID252

DENSE = LLAMA | {"architectures": ["BambooForCausalLM"], "model_type": "bamboo", "hidden_act": "relu"}
MODELS = {"dense": DENSE, "mixture": TURBOSPARSE, "silu": LLAMA}
FLAGS = (
    "--temperature",
    "0",
    "--max-tokens",
    "8",
    "--prompt",
    "Hello world",
    "--threads",
    "1",
    "--json",
    "--ctx",
    "64",
)
VRAM = ("--vram", "8G", "--ram", "4G")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: write_model(folder / name, config) for name, config in MODELS.items()}


@pytest.fixture
def calls(monkeypatch):
    """How often it profiled and measured."""
    calls = []
    monkeypatch.setattr(offline, "NUM_TOKENS", 256)
    profiled = offline.make_profile

    def make_profile(*arguments):
        calls.append("profile")
        return profiled(*arguments)

    def machine_speeds(*_):
        calls.append("plan")
        return speeds_of()

    monkeypatch.setattr(offline, "make_profile", make_profile)
    monkeypatch.setattr(planning, "machine_speeds", machine_speeds)
    return calls


@pytest.fixture
def store(checkpoints, tmp_path):
    def store(name):
        assert convert([str(checkpoints[name]), "-o", str(tmp_path / name)]) == 0
        return tmp_path / name

    return store


@pytest.fixture
def run(calls, capsys, monkeypatch, tmp_path):
    def run(model, *arguments):
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        capsys.readouterr()
        code = main(["--model", str(model), *FLAGS, "--cache-dir", str(tmp_path / "cache"), *arguments])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if code == 0 else captured.out, captured.err

    return run


def plans(folder):
    return sorted(folder.glob("plans/*"))


@pytest.mark.parametrize("name", ["dense", "mixture"])
def test_it_profiles_and_plans_once(run, calls, store, name):
    folder = store(name)
    _, plain, _ = run(folder)
    assert calls == []
    code, first, err = run(folder, *VRAM)
    assert code == 0, err
    assert calls == ["profile", "plan"]
    assert "planned: " in err
    assert f"hybrid-profile {folder} --text FILE" in err
    (plan,) = plans(folder)
    assert re.fullmatch(r"run-vram-8192M-ram-4096M-ctx-64-[0-9a-f]{8}", plan.name)
    assert sorted(path.name for path in plan.iterdir()) == [PLAN, TIERS]
    assert (folder / "profile" / PROFILE).is_file()
    code, second, err = run(folder, *VRAM)
    assert code == 0, err
    assert calls == ["profile", "plan"]
    assert "planned: " not in err
    assert first["text"] == second["text"] == plain["text"]  # the profile's tokens are not in its context


def test_another_budget_or_cache_is_another_plan_of_the_same_profile(run, calls, store):
    folder = store("dense")
    for options in (
        VRAM,
        ("--vram", "4G", "--ram", "4G"),
        ("--vram", "8G", "--ram", "3G"),
        (*VRAM, "--kv-cache", "f16"),
        (*VRAM, "--predictor", "off"),
    ):
        assert run(folder, *options)[0] == 0
        assert run(folder, *options)[0] == 0
    assert calls == ["profile", *["plan"] * 5]
    assert len(plans(folder)) == 5


def test_another_gpu_is_another_plan(run, calls, store, monkeypatch):
    folder = store("dense")
    assert run(folder, *VRAM)[0] == 0
    machine = offline.describe_machine()
    for name, vram in (("some", 8 << 30), ("some", 16 << 30), ("another", 16 << 30)):
        monkeypatch.setattr(
            offline, "describe_machine", lambda n=name, v=vram: replace(machine, gpu_name=n, vram_bytes=v)
        )
        assert run(folder, *VRAM)[0] == 0
    assert calls == ["profile", *["plan"] * 4]
    code, _, err = run(folder, "--vram", "17G", "--ram", "4G")
    assert code == 2
    assert "--vram 17.00 GiB: another has 16.00 GiB; give at most that" in err


def test_a_profile_that_would_break_the_promise_is_left_out(run, calls, store, monkeypatch):
    monkeypatch.setattr(offline, "profiling_bytes", lambda *_: 8 << 30)
    code, answer, err = run(store("dense"), *VRAM)
    assert code == 0, err
    assert answer["text"]
    assert calls == []
    assert re.search(r"no plan for --vram: profiling takes [89]\.\d+ GiB, more than --ram; run hybrid-profile", err)


def test_a_new_profile_is_planned_with(run, calls, store, tmp_path):
    from hybrid_tools.profile import main as profile  # noqa: PLC0415

    folder = store("dense")
    assert run(folder, *VRAM)[0] == 0
    (tmp_path / "text").write_text("Hello world, once upon a time. " * 60)
    options = ["--text", str(tmp_path / "text"), "--window", "64", "--tokens", "512", "--threads", "1", "--restart"]
    assert profile([str(folder), *options]) == 0
    assert run(folder, *VRAM)[0] == 0
    assert calls == ["profile", "plan", "plan"]
    assert json.loads((plans(folder)[0] / PLAN).read_text())["profile_tokens"] == 512


@pytest.mark.parametrize(
    "spoil",
    [
        lambda plan: (plan / PLAN).write_text("{"),
        lambda plan: (plan / TIERS).unlink(),
        lambda plan: (plan / PLAN).write_text(
            (plan / PLAN).read_text().replace('"model_digest": "', '"model_digest": "0')
        ),
    ],
    ids=["damaged", "missing", "other-store"],
)
def test_a_plan_that_is_no_good_is_made_anew(run, calls, store, spoil):
    folder = store("dense")
    assert run(folder, *VRAM)[0] == 0
    spoil(plans(folder)[0])
    code, _, err = run(folder, *VRAM)
    assert code == 0, err
    assert calls == ["profile", "plan", "plan"]


def test_what_the_model_takes_counts_once(run, calls, store, monkeypatch):
    engines = []
    prepared = offline.prepare_plan
    monkeypatch.setattr(
        offline, "prepare_plan", lambda engine, *rest: engines.append(engine) or prepared(engine, *rest)
    )
    folder = store("dense")
    assert run(folder, *VRAM)[0] == 0
    plan = json.loads((plans(folder)[0] / PLAN).read_text())
    memory = engines[0].memory_plan
    rest = memory.expected - memory.weights - memory.kv_cache
    in_ram = sum(part["num_bytes"] for part in plan["parts"] if part["device"] == "ram")
    neurons = sum(layer["ram_neurons"] for layer in plan["layers"]) * 3 * 32 * 4
    assert plan["ram_used_bytes"] == rest + in_ram + neurons


def test_models_without_zeros_are_left_alone(run, calls, store):
    folder = store("silu")
    code, answer, err = run(folder, *VRAM)
    assert code == 0, err
    assert answer["text"] == run(folder)[1]["text"]
    assert calls == []
    assert not (folder / "profile").exists()
    assert not (folder / "plans").exists()


def test_too_short_a_context_to_profile_is_refused(run, calls, store):
    code, _, err = run(store("dense"), *VRAM, "--ctx", "1", "--prompt", "H")
    assert code == 2
    assert calls == []
    assert "--ctx 1" in err
