"""Tokens on disk and batches of them: nothing held out is trained on, and a step's batch is a function of the step."""

import collections
import itertools

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from hybrid_runtime.errors import CheckpointError, TokenizerError, UsageError
from hybrid_runtime.text.documents import read_documents
from hybrid_tools.training.corpus import Batches, document_ids, open_corpus, write_corpus
from hybrid_tools.training.documents import TextFile, is_held_out
from hybrid_tools.training.held_out import read_held_out
from hybrid_tools.training.vocabulary import copy_vocabulary, read_vocabulary, train_vocabulary

from .tiny_runs import write_corpus_text

HELD_OUT = 0.1


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return [
        TextFile(write_corpus_text(folder / "often.txt", 60, seed=1), 3.0),
        TextFile(write_corpus_text(folder / "seldom.txt", 80, seed=2), 0.25),
    ]


@pytest.fixture(scope="module")
def tokenizer(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_vocabulary(files, HELD_OUT, 300, folder)
    return read_vocabulary(folder)


@pytest.fixture(scope="module")
def folder(files, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(files, HELD_OUT, tokenizer, folder)
    return folder


def documents_of(files, *, held_out):
    return [doc for file in files for doc in read_documents(file.path) if is_held_out(doc, HELD_OUT) == held_out]


def test_tokens_are_those_of_the_documents_that_are_not_held_out(files, tokenizer, folder):
    corpus = open_corpus(folder)
    expected = [document_ids(tokenizer, doc) for doc in documents_of(files, held_out=False)]
    assert corpus.tokens.tolist() == list(itertools.chain(*expected))
    assert corpus.lengths.tolist() == [len(ids) for ids in expected]
    assert all(ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id for ids in expected)
    assert tokenizer.decode(expected[0]) == documents_of(files, held_out=False)[0]
    assert [file.num_held_out for file in corpus.index.files] == [
        len(documents_of([file], held_out=True)) for file in files
    ]


def test_held_out_documents_are_kept_as_text_by_file(files, tokenizer, folder):
    kept = [doc for path in sorted((folder / "held_out").iterdir()) for doc in read_documents(path)]
    assert kept == documents_of(files, held_out=True)
    assert len(kept) > 5
    held_out = read_held_out(folder, tokenizer, seq_len=16)
    ids = [token for doc in documents_of(files[:1], held_out=True) for token in document_ids(tokenizer, doc)]
    rows = held_out.sequences["00-often.txt"]
    assert rows.shape == ((len(ids) - 1) // 16, 17)
    assert rows[:, :-1].flatten().tolist() == ids[: 16 * len(rows)]
    assert rows[:, 1:].flatten().tolist() == ids[1 : 16 * len(rows) + 1]
    assert (
        read_held_out(folder, tokenizer, 16, most_sequences=2).sequences["00-often.txt"].tolist() == rows[:2].tolist()
    )


def epoch_of(corpus, seed, seq_len, num_sequences=1):
    """Every sequence of the first epoch."""
    batches = Batches(corpus, seed, num_sequences, seq_len)
    num_steps = len(batches._epoch.sequences) // num_sequences
    return np.concatenate([batches.step(idx) for idx in range(num_steps)])


def test_an_epoch_reads_each_document_as_often_as_its_weight_says(files, tokenizer, folder):
    corpus = open_corpus(folder)
    rows = epoch_of(corpus, seed=4, seq_len=1)  # every token but the last, once, as an input
    read = collections.Counter(rows[:, 0].tolist())
    counts = [
        collections.Counter(
            itertools.chain(*(document_ids(tokenizer, doc) for doc in documents_of([file], held_out=False)))
        )
        for file in files
    ]
    bos = tokenizer.bos_id
    num_seldom = read[bos] - 3 * counts[0][bos]
    assert 0.1 < num_seldom / counts[1][bos] < 0.4  # 0.25, drawn
    for token, count in counts[0].items():
        assert 3 * count - 1 <= read[token] <= 3 * count + counts[1][token]  # -1: the epoch's last is only a target
    assert corpus.tokens_per_epoch == pytest.approx(3 * counts[0].total() + 0.25 * counts[1].total())


def test_sequences_follow_the_documents_and_overlap_by_one_token(folder):
    corpus = open_corpus(folder)
    batches = Batches(corpus, 5, 1, 16)
    epoch = batches._epoch
    starts = np.concatenate([[0], np.cumsum(corpus.lengths)])
    stream = np.concatenate([corpus.tokens[starts[idx] : starts[idx + 1]] for idx in epoch.documents])
    assert sorted(epoch.sequences.tolist()) == list(range((len(stream) - 1) // 16))
    assert epoch.sequences.tolist() != sorted(epoch.sequences.tolist())
    for step_idx, sequence in enumerate(epoch.sequences):
        assert batches.step(step_idx)[0].tolist() == stream[sequence * 16 : sequence * 16 + 17].tolist()


def test_a_steps_batch_is_a_function_of_seed_and_step(folder):
    corpus = open_corpus(folder)
    steps = [0, 1, 7, 300, 3, 0, 299, 300]  # some of the second epoch and later, forwards and back
    first, again = Batches(corpus, 1, 4, 16), Batches(corpus, 1, 4, 16)
    expected = {step: first.step(step) for step in range(301)}
    assert all(np.array_equal(again.step(step), expected[step]) for step in steps)
    assert first._epoch.idx >= 1
    other = Batches(corpus, 2, 4, 16)
    assert not np.array_equal(other.step(0), expected[0])
    assert expected[0].shape == (4, 17)


def test_epochs_are_ordered_anew(folder):
    batches = Batches(open_corpus(folder), 1, 1, 16)
    first = batches._epoch.documents.tolist()
    batches.step(len(batches._epoch.sequences))
    assert batches._epoch.documents.tolist() != first


def test_text_shorter_than_a_step_is_refused(folder):
    with pytest.raises(UsageError, match="one step reads 1638401; give more text"):
        Batches(open_corpus(folder), 1, 100, 16384)


def test_tokens_file_of_another_length_is_refused(files, tokenizer, tmp_path):
    write_corpus(files, HELD_OUT, tokenizer, tmp_path)
    with (tmp_path / "tokens.bin").open("ab") as file:
        file.write(b"\0\0\0\0")
    with pytest.raises(CheckpointError, match="its index says"):
        open_corpus(tmp_path)


def test_vocabulary_learns_from_weights_and_never_from_what_is_held_out(tmp_path):
    rare, common = tmp_path / "rare.txt", tmp_path / "common.txt"
    rare.write_text("<|endoftext|>".join(f"zyx zyx zyx {idx}" for idx in range(60)))
    common.write_text("<|endoftext|>".join(f"abc abc abc {idx}" for idx in range(60)))
    held = [doc for doc in read_documents(rare) if is_held_out(doc, HELD_OUT)]
    assert held
    train_vocabulary([TextFile(rare, 0.5), TextFile(common, 9.0)], HELD_OUT, 280, tmp_path / "tokenizer")
    tokenizer = read_vocabulary(tmp_path / "tokenizer")
    pieces = {tokenizer.token_of(idx) for idx in range(tokenizer.vocab_size)}
    assert {"▁a", "▁ab", "▁abc"} & pieces
    assert not any(piece.startswith("▁z") and len(piece) > 2 for piece in pieces)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, True)


def test_any_text_survives_the_vocabulary(tokenizer):
    for text in ("  two spaces\n\nand lines", "ä€😀", "1234567 <s>", "\ttab"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_without_an_end_is_refused(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.decoder = decoders.ByteLevel()
    words.save(str(tmp_path / "tokenizer.json"))
    copy_vocabulary(tmp_path / "tokenizer.json", tmp_path / "copy")
    with pytest.raises(TokenizerError, match="names no eos_token"):
        read_vocabulary(tmp_path / "copy")


def test_lines_too_long_for_sentencepiece_are_cut_and_not_left_out(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("ä" * 10_000 + "ab" * 10_000)
    train_vocabulary([TextFile(path)], 0.0, 264, tmp_path / "tokenizer")
    tokenizer = read_vocabulary(tmp_path / "tokenizer")
    assert any("ä" in str(tokenizer.token_of(idx)) for idx in range(259, tokenizer.vocab_size))
