"""Which files are wanted, and which names are harmless."""

from __future__ import annotations

import pytest

from hybrid_runtime.errors import CheckpointError
from hybrid_runtime.hub.names import is_repo_id, is_safe_file
from hybrid_runtime.hub.selection import missing_shards, select_files


def test_shards_of_the_index_are_preferred_to_a_second_copy():
    names = ["consolidated.safetensors", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "x.py"]
    assert select_files(names, "a/b", None) == ["model.safetensors.index.json", "model-00001-of-00001.safetensors"]


def test_single_file_is_preferred_to_a_second_copy():
    assert select_files(["model.safetensors", "model.fp16.safetensors"], "a/b", None) == ["model.safetensors"]


def test_unusual_names_at_the_root_are_taken_and_folders_are_not():
    names = ["weights-a.safetensors", "onnx/model.safetensors", "config.json", "original/params.json"]
    assert select_files(names, "a/b", None) == ["config.json", "weights-a.safetensors"]


def test_safetensors_win_over_gguf():
    assert select_files(["a.gguf", "model.safetensors"], "a/b", None) == ["model.safetensors"]


def test_repository_without_weights_is_told_from_one_of_pickles():
    with pytest.raises(CheckpointError, match="holds no weights"):
        select_files(["config.json", "README.md"], "a/b", None)
    with pytest.raises(CheckpointError, match=r"a\.ckpt, b\.pth, c\.pkl, d\.pt and 1 more"):
        select_files(["a.ckpt", "b.pth", "c.pkl", "d.pt", "e.bin"], "a/b", None)


def test_missing_shards_follow_from_the_numbering():
    assert missing_shards([f"m-0000{i}-of-00004.safetensors" for i in (1, 4)]) == [
        "m-00002-of-00004.safetensors",
        "m-00003-of-00004.safetensors",
    ]
    assert missing_shards(["model.safetensors"]) == []


@pytest.mark.parametrize("name", ["config.json", "sub/model-q4.gguf", ".gitattributes", "größe.json"])
def test_ordinary_file_names_are_safe(name):
    assert is_safe_file(name)


@pytest.mark.parametrize("name", ["", "..", ".. ", "a/..", "a/.", "/a", "a/", "a//b", "a\\b", "c:a", "a\0", "x" * 256])
def test_other_file_names_are_not(name):
    assert not is_safe_file(name)


@pytest.mark.parametrize("text", ["a/b", "Tiiny/SmallThinker-4BA0.6B-Instruct", "PowerInfer/Bamboo-base-v0_1"])
def test_repository_ids_are_recognised(text):
    assert is_repo_id(text)


@pytest.mark.parametrize(
    "text", ["a", "a/b/c", "a/", "/b", "a/.b", "a/b.", "a/b..c", "a--b/c", "a/b\n", "a/" + "b" * 95]
)
def test_other_texts_are_no_repository_ids(text):
    assert not is_repo_id(text)
