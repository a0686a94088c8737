"""GGUF metadata: what llama.cpp's rules make of it, and every fault named by its field."""

from __future__ import annotations

import re

import numpy as np
import pytest

from hybrid_runtime.errors import TokenizerError
from hybrid_runtime.text.load import tokenizer_from_gguf


def changed(metadata, **fields):
    """The metadata with some fields replaced, or left out where the value is None."""
    content = {**metadata, **{f"tokenizer.ggml.{name}": value for name, value in fields.items()}}
    return {key: value for key, value in content.items() if value is not None}


def field(metadata, name):
    return list(metadata[f"tokenizer.ggml.{name}"])


def replaced(values, idx, value):
    return [*values[:idx], value, *values[idx:][1:]]


def tokens_of(tokenizer, text, **flags):
    return [tokenizer.token_of(token_id) for token_id in tokenizer.encode(text, **flags)]


SPM_FAULTS = {
    "model-unknown": (lambda m: {"model": "bert"}, "model: found 'bert'; known are 'llama' (SPM) and 'gpt2'"),
    "model-missing": (lambda m: {"model": None}, "model: found None"),
    "tokens-missing": (lambda m: {"tokens": None}, "tokens is missing"),
    "tokens-empty": (lambda m: {"tokens": []}, "tokens: found an empty list"),
    "tokens-text": (lambda m: {"tokens": "abc"}, "tokens: found str; expected a list"),
    "tokens-bytes": (lambda m: {"tokens": replaced(field(m, "tokens"), 3, b"x")}, "tokens[3]: found bytes"),
    "token-empty": (lambda m: {"tokens": replaced(field(m, "tokens"), 3, "")}, "tokens[3]: found an empty text"),
    "token-twice": (
        lambda m: {"tokens": replaced(field(m, "tokens"), 260, "<s>")},
        "tokens: '<s>' stands at 1 and at 260",
    ),
    "scores-missing": (lambda m: {"scores": None}, "scores is missing"),
    "scores-short": (lambda m: {"scores": field(m, "scores")[1:]}, "scores: found 279 entries for 280 tokens"),
    "scores-nan": (lambda m: {"scores": replaced(field(m, "scores"), 7, float("nan"))}, "scores[7]: found nan"),
    "scores-text": (lambda m: {"scores": replaced(field(m, "scores"), 7, "1")}, "scores[7]: found '1'"),
    "types-short": (lambda m: {"token_type": [1]}, "token_type: found 1 entries for 280 tokens"),
    "type-unknown": (lambda m: {"token_type": replaced(field(m, "token_type"), 9, 17)}, "token_type[9]: found 17"),
    "bytes-missing": (
        lambda m: {"token_type": replaced(field(m, "token_type"), 9, 1)},
        "token_type: found 255 byte tokens; expected all 256 or none",
    ),
    "bos-outside": (lambda m: {"bos_token_id": 280}, "bos_token_id: found 280, which is outside the vocabulary of 280"),
    "eos-outside": (lambda m: {"eos_token_id": 10**9}, "eos_token_id: found 1000000000, which is outside"),
    "eot-negative": (lambda m: {"eot_token_id": -7}, "eot_token_id: found -7, which is outside"),
    "bos-text": (lambda m: {"bos_token_id": "1"}, "bos_token_id: found '1'; expected an integer"),
    "flag-number": (lambda m: {"add_bos_token": 1}, "add_bos_token: found 1; expected true or false"),
}

BPE_FAULTS = {
    "pre-unknown": (lambda m: {"pre": "klingon"}, "pre: found 'klingon', which is not known here; known are codeshell"),
    "merges-missing": (lambda m: {"merges": None}, "merges is missing"),
    "merge-one-piece": (lambda m: {"merges": ["he"]}, "merges[0]: found 'he'; expected two pieces"),
    "merge-not-token": (lambda m: {"merges": ["h e", "e h"]}, "merges[1] 'e' + 'h': 'eh' is not in the vocabulary"),
    "merge-left": (lambda m: {"merges": ["日 e"]}, "merges[0] '日' + 'e': '日' is not in the vocabulary"),
    "token-twice": (lambda m: {"tokens": replaced(field(m, "tokens"), 5, "!")}, "tokens: '!' stands at 0 and at 5"),
    "bos-outside": (lambda m: {"bos_token_id": 266}, "bos_token_id: found 266, which is outside the vocabulary of 266"),
}


@pytest.mark.parametrize(("change", "message"), SPM_FAULTS.values(), ids=SPM_FAULTS.keys())
def test_spm_faults_name_the_file_and_the_field(spm_metadata, change, message):
    with pytest.raises(TokenizerError, match=re.escape(message)) as caught:
        tokenizer_from_gguf(changed(spm_metadata, **change(spm_metadata)), file="model.gguf")
    assert str(caught.value).startswith("model.gguf: tokenizer.ggml.")


@pytest.mark.parametrize(("change", "message"), BPE_FAULTS.values(), ids=BPE_FAULTS.keys())
def test_bpe_faults_name_the_file_and_the_field(bpe_metadata, change, message):
    with pytest.raises(TokenizerError, match=re.escape(message)) as caught:
        tokenizer_from_gguf(changed(bpe_metadata, **change(bpe_metadata)), file="model.gguf")
    assert str(caught.value).startswith("model.gguf: ")


def test_spm_merges_the_best_score_first_and_falls_back_to_bytes(spm):
    assert tokens_of(spm, "hello world") == ["<s>", "▁hello", "▁wor", "ld"]
    assert tokens_of(spm, "x", add_special=False) == ["▁", "<0x78>"]
    assert tokens_of(spm, "🦙", add_special=False) == ["▁", "<0xF0>", "<0x9F>", "<0xA6>", "<0x99>"]


def test_spm_puts_a_space_before_the_text_and_after_each_parsed_token(spm_metadata):
    text = "hello<|im_end|>hello"
    with_space = tokenizer_from_gguf(spm_metadata, file="a.gguf")
    assert tokens_of(with_space, text, add_special=False, parse_special=True) == ["▁hello", "<|im_end|>", "▁hello"]
    without = tokenizer_from_gguf(changed(spm_metadata, add_space_prefix=False), file="b.gguf")
    assert tokens_of(without, text, add_special=False, parse_special=True) == ["hello", "<|im_end|>", "hello"]
    assert without.decode(without.encode(" hello")) == " hello"


def test_silent_spm_file_gets_bos_and_llama_ids(spm_metadata):
    silent = changed(spm_metadata, bos_token_id=None, eos_token_id=None, unknown_token_id=None)
    tokenizer = tokenizer_from_gguf(silent, file="a.gguf")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, True)
    assert tokenizer.encode("hello")[0] == 1


def test_the_files_own_flags_hold(spm_metadata):
    flags = changed(spm_metadata, add_bos_token=False, add_eos_token=True)
    tokenizer = tokenizer_from_gguf(flags, file="a.gguf")
    assert not tokenizer.add_bos
    assert tokens_of(tokenizer, "hello") == ["▁hello", "</s>"]


def test_minus_one_means_no_such_token(spm_metadata):
    none = changed(spm_metadata, bos_token_id=0xFFFFFFFF, eot_token_id=-1)
    tokenizer = tokenizer_from_gguf(none, file="a.gguf")
    assert tokenizer.bos_id is None
    assert not tokenizer.add_bos
    assert tokens_of(tokenizer, "hello") == ["▁hello"]


def test_a_file_without_token_types_is_read_by_names(spm_metadata):
    untyped = tokenizer_from_gguf(changed(spm_metadata, token_type=None), file="a.gguf")
    typed = tokenizer_from_gguf(spm_metadata, file="b.gguf")
    for text in ("hello world", "é🦙 x"):
        assert untyped.encode(text) == typed.encode(text)
        assert untyped.decode(untyped.encode(text)) == text


def test_every_end_of_turn_counts(spm_metadata, bpe_metadata):
    spm = tokenizer_from_gguf(changed(spm_metadata, eot_token_id=5, eom_token_id=6), file="a.gguf")
    assert spm.end_ids == {2, 5, 6, spm.id_of("<|im_end|>")}
    bpe = tokenizer_from_gguf(bpe_metadata, file="b.gguf")
    assert bpe.end_ids == {bpe.id_of("<|endoftext|>"), bpe.id_of("<|im_end|>")}


def test_a_plain_piece_that_looks_like_an_end_of_turn_is_none(bpe_metadata):
    types = field(bpe_metadata, "token_type")
    tokens = field(bpe_metadata, "tokens")
    plain = replaced(types, tokens.index("<|im_end|>"), 1)
    tokenizer = tokenizer_from_gguf(changed(bpe_metadata, token_type=plain), file="a.gguf")
    assert tokenizer.end_ids == {tokens.index("<|endoftext|>")}


def test_arrays_are_lists(spm_metadata):
    arrays = changed(
        spm_metadata,
        scores=np.array(field(spm_metadata, "scores"), dtype=np.float32),
        token_type=np.array(field(spm_metadata, "token_type"), dtype=np.int32),
    )
    tokenizer = tokenizer_from_gguf(arrays, file="a.gguf")
    assert tokens_of(tokenizer, "hello world") == ["<s>", "▁hello", "▁wor", "ld"]


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", "I ' VE Ġ12345 `="),
        ("default", "I ' VE Ġ 123 45 ` ="),
        ("falcon", "I ' VE Ġ 123 45 `="),
        ("starcoder", "I ' VE Ġ 1 2 3 4 5 `="),
        ("qwen2", "I 'VE Ġ 1 2 3 4 5 `="),
        ("llama-bpe", "I 'VE Ġ 123 45 `="),
    ],
    ids=["gpt-2", "default", "falcon", "starcoder", "qwen2", "llama-bpe"],
)
def test_pre_decides_how_a_text_is_cut_into_words(bpe_metadata, pre, words):
    tokenizer = tokenizer_from_gguf(changed(bpe_metadata, pre=pre), file="a.gguf")
    cuts = tokenizer.vocabulary._tokenizer.pre_tokenizer.pre_tokenize_str("I'VE 12345`=")
    assert " ".join(word for word, _ in cuts) == words


def test_llama3_files_begin_with_bos_and_take_whole_words_first(bpe_metadata):
    no_merges = changed(bpe_metadata, pre="llama-bpe", merges=[])
    tokenizer = tokenizer_from_gguf(no_merges, file="a.gguf")
    assert tokens_of(tokenizer, "hello") == ["<|endoftext|>", "hello"]
    gpt2 = tokenizer_from_gguf(changed(bpe_metadata, merges=[]), file="a.gguf")
    assert tokens_of(gpt2, "hello") == ["h", "e", "l", "l", "o"]
