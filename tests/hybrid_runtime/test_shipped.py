"""The models in the package: whole, small enough, described, and not touched by running them."""

import json
import shlex
from pathlib import Path

import pytest

from hybrid_runtime.errors import CheckpointError, UsageError
from hybrid_runtime.progress import NoProgress
from hybrid_runtime.shipped import DEFAULT_MODEL, SHIPPED_MODELS
from hybrid_runtime.store.reader import open_store
from hybrid_runtime.stores import ModelRequest, convert_model, find_model

LARGEST_BYTES = 12_000_000
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", SHIPPED_MODELS)
def test_every_byte_is_what_the_manifest_says(name):
    store = open_store(SHIPPED_MODELS[name])
    store.verify()
    assert store.manifest.model == name


@pytest.mark.parametrize("name", SHIPPED_MODELS)
def test_folder_is_small_and_holds_nothing_else(name):
    store = open_store(SHIPPED_MODELS[name])
    files = [path for path in store.folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LARGEST_BYTES
    expected = {"store.json", "training.json", "tokenizer.model", "hybrid_tokenizer.json"} | {
        part.file for part in store.manifest.parts
    }
    assert {path.name for path in files} == expected


def test_default_model_is_a_sparse_mixture_of_four_experts_or_more():
    config = open_store(SHIPPED_MODELS[DEFAULT_MODEL]).manifest.config
    assert (config.family, config.activation.kind, config.num_experts_per_tok) == ("turbosparsemixtral", "drelu", 2)
    assert config.num_experts >= 4


def test_a_folder_of_the_same_name_here_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = find_model(ModelRequest(DEFAULT_MODEL), tmp_path / "cache", NoProgress())
    assert found.source.folder == SHIPPED_MODELS[DEFAULT_MODEL]
    (tmp_path / DEFAULT_MODEL).mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        find_model(ModelRequest(DEFAULT_MODEL), tmp_path / "cache", NoProgress())


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (ModelRequest(DEFAULT_MODEL, revision="main"), "--revision main: tinystories-moe is not a repository"),
        (ModelRequest(DEFAULT_MODEL, ffn_activation="drelu"), "its activation was fixed"),
        (ModelRequest(DEFAULT_MODEL, quant="q4", ffn_activation="drelu"), "its activation was fixed"),
        (ModelRequest(DEFAULT_MODEL, quant="f32", group=32), "weights share no scales"),
    ],
    ids=["revision", "activation", "activation-and-quant", "group"],
)
def test_what_a_shipped_store_cannot_do_is_refused_by_name(request_, match, tmp_path):
    with pytest.raises(UsageError, match=match):
        find_model(request_, tmp_path / "cache", NoProgress())
    assert not (tmp_path / "cache").exists()


def test_package_is_never_written_to(tmp_path):
    before = sorted(path for path in SHIPPED_MODELS[DEFAULT_MODEL].rglob("*"))
    convert_model(ModelRequest(DEFAULT_MODEL, "q4"), tmp_path / "q4", tmp_path / "cache", NoProgress())
    assert sorted(path for path in SHIPPED_MODELS[DEFAULT_MODEL].rglob("*")) == before


def test_store_says_which_machine_and_command_made_its_weights():
    store = open_store(SHIPPED_MODELS[DEFAULT_MODEL])
    notes = json.loads((store.folder / "training.json").read_text())
    assert notes == json.loads((ROOT / "benchmarks" / "models" / DEFAULT_MODEL / "training.json").read_text())
    assert notes["made_by"] == "hybrid-train"
    assert notes["machine"]
    assert notes["num_steps_done"] == notes["num_steps"]
    assert {file["name"] for file in notes["text"]} >= {"tinystories_v2_00.txt.gz", "tinystories_train_2MB.txt"}
    config = store.manifest.config
    assert notes["recipe"]["config"]["num_experts"] == config.num_experts
    program, *words = shlex.split(notes["command"])
    assert program == "hybrid-train"
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert options["--activation"] == "drelu"
    assert options["--seed"] == str(notes["recipe"]["seed"])
    assert notes["training_seconds"] < 3 * 3600
