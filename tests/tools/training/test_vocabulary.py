"""A run's vocabulary: what is too large is refused with a size that works, the folder reads as others read it."""

from __future__ import annotations

import re
import shutil

import pytest
import sentencepiece

from hybrid_runtime.demo import make_demo
from hybrid_runtime.errors import TokenizerError, UsageError
from hybrid_runtime.text.load import load_tokenizer
from hybrid_tools.training.documents import TextFile
from hybrid_tools.training.vocabulary import copy_vocabulary, read_vocabulary, train_vocabulary

from .tiny_runs import train

HELD_OUT = 0.1


def test_the_size_that_is_offered_instead_of_one_too_large_works(text, tmp_path):
    with pytest.raises(UsageError, match="the text supports at most") as refused:
        train_vocabulary([TextFile(text)], HELD_OUT, 5000, tmp_path)
    offered = int(re.search(r"use --vocab-size (\d+)", str(refused.value))[1])
    assert not (tmp_path / "tokenizer.model").exists()
    train_vocabulary([TextFile(text)], HELD_OUT, offered, tmp_path)
    assert read_vocabulary(tmp_path).vocab_size == offered


def test_the_size_that_is_asked_for_instead_of_one_too_small_works(text, tmp_path):
    with pytest.raises(UsageError, match="use more") as refused:
        train_vocabulary([TextFile(text)], HELD_OUT, 261, tmp_path)
    needed = int(re.search(r"are (\d+) pieces already", str(refused.value))[1])
    train_vocabulary([TextFile(text)], HELD_OUT, needed, tmp_path)
    assert read_vocabulary(tmp_path).vocab_size == needed


def test_the_same_text_gives_the_same_vocabulary(text, tmp_path):
    for name in ("first", "second"):
        train_vocabulary([TextFile(text, 0.5), TextFile(text, 2.0)], HELD_OUT, 290, tmp_path / name)
    first, second = (tmp_path / name / "tokenizer.model" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_a_folders_files_are_copied_as_they_are_and_weights_are_not(tmp_path):
    demo = make_demo(tmp_path / "demo")
    (demo / "chat_template.jinja").write_text("{{ messages[0].content }}")
    copy_vocabulary(demo, tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja"} <= names
    assert not names & {"model.safetensors", "config.json"}
    assert all((tmp_path / "copy" / name).read_bytes() == (demo / name).read_bytes() for name in names)
    assert load_tokenizer(tmp_path / "copy").encode("the cat") == load_tokenizer(demo).encode("the cat")


@pytest.mark.parametrize("kind", ["empty-folder", "no-vocabulary"])
def test_what_is_no_tokenizer_is_refused(kind, tmp_path):
    path = tmp_path / "other"
    if kind == "empty-folder":
        path.mkdir()
    else:
        path.write_bytes(b"a thesis")
    with pytest.raises(TokenizerError, match=str(path)):
        copy_vocabulary(path, tmp_path / "copy")


@pytest.mark.parametrize("num_experts", [0, 4], ids=["llama", "mixtral"])
def test_model_cuts_text_as_sentencepiece_does(num_experts, text, tmp_path):
    run = tmp_path / "run"
    assert train(text, run, f"--experts={num_experts}", tokens=128) == 0
    shutil.rmtree(run / "tokenizer")
    ours = load_tokenizer(run / "model")
    theirs = sentencepiece.SentencePieceProcessor(str(run / "model" / "tokenizer.model"))
    for sentence in (
        "the cat saw Lily",
        "7 red balls ä€😀\n\nand lines",
        "x  y   z ",
        "",
        "  two spaces",
        " \n x",
        "<s>",
    ):
        assert ours.encode(sentence) == [theirs.bos_id(), *theirs.encode(sentence)], sentence
        assert ours.decode(ours.encode(sentence)[1:]) == sentence
