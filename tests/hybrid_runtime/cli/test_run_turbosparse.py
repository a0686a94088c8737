"""A folder shaped as TurboSparse-Mixtral is published runs by its path, by its repository, and by its alias."""

import io
import json

import pytest
from safetensors import safe_open

from hybrid_runtime.cli.run import main

from ..hub.conftest import FakeHub, clean_environment, direct_client  # noqa: F401, TID252  # fixtures
from ..model.conftest import one_thread  # noqa: F401, TID252  # a fixture
from ..small_models import TURBOSPARSE, write_model  # noqa: TID252  # absolute names are the runtime's

NUM_SHARDS = 3
FLAGS = ("--temperature", "0", "--max-tokens", "16", "--prompt", "Hello world", "--threads", "1", "--json")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("published") / "any-name", TURBOSPARSE, num_shards=NUM_SHARDS)


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        code = main([*FLAGS, "--cache-dir", str(tmp_path / "cache"), *arguments])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if code == 0 else captured.out, captured.err

    return run


@pytest.fixture
def hub(published, monkeypatch):
    hub = FakeHub()
    files = {path.name: path.read_bytes() for path in published.iterdir()}
    hub.add("Tiiny/TurboSparse-Mixtral", files | {"README.md": b"#", "modeling_x.py": b"raise SystemExit"})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    yield hub
    hub.close()


def test_the_folder_is_shaped_as_the_published_one(published):
    index = json.loads((published / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) == NUM_SHARDS
    assert len({file for name, file in index.items() if name.startswith("model.layers.0.")}) > 1  # cut inside a layer
    expert = "model.layers.{}.block_sparse_moe.experts.0.predictor.fc1.weight"
    ranks = set()
    for layer_idx in range(2):
        with safe_open(published / index[expert.format(layer_idx)], "pt") as file:
            ranks.add(file.get_slice(expert.format(layer_idx)).get_shape()[0])
    assert len(ranks) == 2


def test_path_repository_and_alias_give_the_same_text(run, published, hub):
    _, by_path, _ = run("--model", str(published))
    code, by_repository, err = run("--model", "Tiiny/TurboSparse-Mixtral")
    assert code == 0
    assert "TurboSparse-Mixtral (turbosparsemixtral), f32" in err
    assert by_repository["text"] == by_path["text"]
    assert by_repository["model"] == "TurboSparse-Mixtral"
    shards = [hit for hit in hub.hits if hit.file and hit.file.endswith(".safetensors") and hit.sent_bytes]
    assert len(shards) == NUM_SHARDS
    assert not [hit for hit in hub.hits if hit.file in ("README.md", "modeling_x.py")]

    _, by_alias, _ = run("--model", "turbosparse-mixtral")
    assert by_alias["text"] == by_path["text"]
    assert len([hit for hit in hub.hits if hit.file and hit.file.endswith(".safetensors") and hit.sent_bytes]) == 3

    hub.close()
    code, offline, err = run("--model", "turbosparse-mixtral", "--offline")
    assert code == 0
    assert offline["text"] == by_path["text"]
    assert "converting" not in err


def test_former_organisation_serves_the_alias_too(run, published, hub):
    hub.repos["PowerInfer/TurboSparse-Mixtral"] = hub.repos.pop("Tiiny/TurboSparse-Mixtral")
    _, by_path, _ = run("--model", str(published))
    code, by_alias, _ = run("--model", "turbosparse-mixtral")
    assert code == 0
    assert by_alias["text"] == by_path["text"]


def test_repository_that_is_not_there_is_one_line(run, hub, tmp_path):
    code, out, err = run("--model", "acme/nothing")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "acme/nothing" in err
    assert not (tmp_path / "cache").exists()


def test_offline_without_a_copy_says_how_to_get_one(run, hub, tmp_path):
    code, out, err = run("--model", "turbosparse-mixtral", "--offline")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "offline" in err
    assert hub.hits == []
    assert not (tmp_path / "cache").exists()
