"""Model folders: index and shards agree in both directions, or the one that does not is named."""

import json

import pytest
import torch
from safetensors.torch import save_file

from hybrid_runtime.checkpoints.safetensors_folder import open_safetensors_folder
from hybrid_runtime.checkpoints.tensor_file import read_rows
from hybrid_runtime.errors import CheckpointError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """Two shards of two tensors each, with their index."""
    save_file({"a": torch.ones(4), "b": torch.zeros(2, 3)}, tmp_path / FIRST)
    save_file({"c": torch.full((5,), 2.0), "d": torch.ones(1)}, tmp_path / SECOND)
    write_index(tmp_path, a=FIRST, b=FIRST, c=SECOND, d=SECOND)
    return tmp_path


def write_index(folder, /, **weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def refused(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_safetensors_folder(folder)
    assert str(caught.value).startswith(str(folder))
    return str(caught.value)


def test_shards_are_one_model_whatever_total_size_claims(folder):
    tensors = open_safetensors_folder(folder)
    assert {name: info.path.name for name, info in tensors.items()} == {
        "a": FIRST,
        "b": FIRST,
        "c": SECOND,
        "d": SECOND,
    }
    assert torch.equal(read_rows(tensors["c"]), torch.full((5,), 2.0))


def test_a_single_file_needs_no_index(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    assert set(open_safetensors_folder(tmp_path)) == {"a"}


def test_an_index_may_name_the_single_file(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    write_index(tmp_path, a="model.safetensors")
    assert set(open_safetensors_folder(tmp_path)) == {"a"}


def test_shards_may_be_links_as_in_the_hugging_face_cache(folder):
    blob = folder / "blob"
    (folder / FIRST).rename(blob)
    (folder / FIRST).symlink_to(blob)
    assert set(open_safetensors_folder(folder)) == {"a", "b", "c", "d"}


def test_mistrals_consolidated_files_and_pickles_beside_shards_are_ignored(folder):
    for name in ("consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(b"never opened")
    assert set(open_safetensors_folder(folder)) == {"a", "b", "c", "d"}


def test_a_missing_shard_is_named(folder):
    (folder / SECOND).unlink()
    assert f"{INDEX} names '{SECOND}', not found" in refused(folder)


@pytest.mark.parametrize("extra", ["model-00003-of-00003.safetensors", "model-00003-of-00002.safetensors"])
def test_an_extra_shard_is_named(folder, extra):
    save_file({"e": torch.ones(1)}, folder / extra)
    assert f"'{extra}' not named by {INDEX}" in refused(folder)


def test_a_single_file_beside_an_index_that_does_not_name_it_is_ambiguous(folder):
    save_file({"a": torch.ones(4)}, folder / "model.safetensors")
    assert "has both" in refused(folder)


def test_a_tensor_that_its_shard_does_not_hold_is_named(folder):
    write_index(folder, a=FIRST, b=FIRST, c=SECOND, d=SECOND, e=SECOND)
    assert "tensor 'e' is in no shard" in refused(folder)


def test_a_tensor_in_another_shard_than_the_index_says_is_named(folder):
    write_index(folder, a=FIRST, b=SECOND, c=SECOND, d=SECOND)
    assert f"tensor 'b' is in {FIRST}, {INDEX} says {SECOND}" in refused(folder)


def test_a_tensor_that_the_index_does_not_name_is_named(folder):
    write_index(folder, a=FIRST, c=SECOND, d=SECOND)
    assert f"tensor 'b' of {FIRST} is not in {INDEX}" in refused(folder)


def test_a_tensor_in_two_shards_is_named(folder):
    save_file({"c": torch.ones(5), "d": torch.ones(1), "a": torch.ones(4)}, folder / SECOND)
    message = refused(folder)
    assert "tensor 'a'" in message
    assert FIRST in message
    assert SECOND in message


@pytest.mark.parametrize("keep", [0, 7, 8, "half", "all but one"])
def test_a_truncated_shard_is_named(folder, keep):
    content = (folder / SECOND).read_bytes()
    num_bytes = {"half": len(content) // 2, "all but one": len(content) - 1}.get(keep, keep)
    (folder / SECOND).write_bytes(content[:num_bytes])
    assert str(folder / SECOND) in refused(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "..\\model.safetensors",
        "sub/model.safetensors",
        "C:model.safetensors",
        "nul\0.safetensors",
        "..safetensors",
        "model-00001-of-00002.bin",
        "",
        "x" * 300 + ".safetensors",
    ],
)
def test_a_shard_name_that_is_no_plain_file_name_is_refused(folder, name):
    write_index(folder, a=name)
    assert "weight_map 'a' is" in refused(folder)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}"}}}}', "'a' twice"),
        ('{"weight_map": {}, "weight_map": {"a": "x"}}', "'weight_map' twice"),
        ("{}", "weight_map is missing"),
        ('{"weight_map": {}}', "weight_map is missing"),
        ('{"weight_map": []}', "weight_map is missing"),
        ('{"weight_map": {"a": 1}}', "weight_map 'a' is 1"),
        ('{"weight_map": {"a": ["x"]}}', "weight_map 'a' is a list"),
        ("[]", "is a JSON list"),
        ("", "not JSON"),
        ('{"weight_map":' * 100_000, "nested too deeply"),
    ],
    ids=["tensor twice", "map twice", "no map", "empty map", "list", "number", "nested", "no object", "empty", "bomb"],
)
def test_a_broken_index_is_refused(folder, index, expected):
    (folder / INDEX).write_text(index)
    message = refused(folder)
    assert expected in message
    assert INDEX in message


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.ckpt"])
def test_a_folder_of_pickles_is_refused_and_they_stay_closed(tmp_path, pickle):
    (tmp_path / pickle).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    message = refused(tmp_path)
    assert "never loaded" in message
    assert pickle in message
    assert "safetensors" in message


def test_shards_without_an_index_are_refused(folder):
    (folder / INDEX).unlink()
    assert f"no {INDEX}" in refused(folder)


def test_mistrals_consolidated_file_alone_is_refused_by_name(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "consolidated.safetensors")
    assert "consolidated.safetensors" in refused(tmp_path)


def test_an_empty_folder_and_no_folder_are_refused(tmp_path):
    assert "has no model.safetensors" in refused(tmp_path)
    assert "cannot be listed" in refused(tmp_path / "absent")
