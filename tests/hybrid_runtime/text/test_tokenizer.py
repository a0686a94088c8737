"""Encoding, decoding, streaming and saving, on both backends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid_runtime.errors import TokenizerError
from hybrid_runtime.text.load import load_tokenizer
from hybrid_runtime.text.saved_form import SETTINGS_FILE

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# U+2581 is how sentencepiece writes a space, so it comes back as one
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40) | st.text(
    st.sampled_from("hello world é🦙\n\t"), max_size=40
)


def streamed(tokenizer, ids, after=()):
    stream = tokenizer.stream(after=after)
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


@QUICK
@given(text=TEXTS)
def test_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text
    assert tokenizer.decode(tokenizer.encode(text)) == text


@QUICK
@given(text=TEXTS)
def test_stream_of_a_text_is_that_text_without_replacement_characters(tokenizer, text):
    chunks = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(chunks) == text
    assert "".join(chunks).count("\ufffd") == text.count("\ufffd")
    assert chunks[-1] == ""  # nothing is held back at the end of whole characters


@QUICK
@given(data=st.data())
def test_stream_of_any_ids_equals_decoding_them_and_never_takes_text_back(tokenizer, data):
    # byte tokens are most of both vocabularies, so this is mostly broken UTF-8
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    whole = tokenizer.decode(ids)
    chunks = streamed(tokenizer, ids)
    assert "".join(chunks) == whole
    for count in range(len(chunks)):
        assert whole.startswith("".join(chunks[:count]))


def test_stream_holds_back_the_bytes_of_an_unfinished_character(tokenizer):
    ids = tokenizer.encode("🦙", add_special=False)
    chunks = streamed(tokenizer, ids)
    assert len(ids) >= 4
    assert chunks[-2:] == ["🦙", ""]
    assert not any(chunks[:-2])


def test_bytes_that_never_become_a_character_are_replaced_when_the_next_one_comes(tokenizer):
    llama, letter = tokenizer.encode("🦙", add_special=False), tokenizer.id_of("h")
    stream = tokenizer.stream()
    assert [stream.push(token_id) for token_id in llama[:-1]] == [""] * (len(llama) - 1)
    assert stream.push(letter) == "\ufffdh"
    assert stream.flush() == ""
    assert [stream.push(llama[-4]), stream.flush()] == ["", "\ufffd"]


def test_stream_after_a_prompt_keeps_the_space_of_the_first_word(tokenizer):
    prompt, answer = tokenizer.encode("hello"), tokenizer.encode("hello hello", add_special=False)[1:]
    assert "".join(streamed(tokenizer, answer, after=prompt)) == " hello"
    assert tokenizer.decode([*prompt, *answer]) == "hello hello"


def test_control_tokens_in_text_count_only_on_request(tokenizer):
    end = tokenizer.id_of("<|im_end|>")
    plain = tokenizer.encode("hello<|im_end|>", add_special=False)
    parsed = tokenizer.encode("hello<|im_end|>", add_special=False, parse_special=True)
    assert end not in plain
    assert tokenizer.decode(plain) == "hello<|im_end|>"
    assert parsed[-1] == end
    assert tokenizer.decode(parsed) == "hello"


@pytest.mark.parametrize("name", ["<s>", "</s>", "<unk>", "<|im_start|>", "<0x41>"])
def test_sentencepiece_never_makes_a_control_token_of_plain_text(spm, name):
    assert spm.id_of(name) is not None
    ids = spm.encode(f"{name}{name}", add_special=False)
    assert spm.id_of(name) not in ids
    assert spm.decode(ids) == name * 2


def test_user_defined_tokens_are_cut_out_always_and_take_a_space_after_them(spm):
    ids = spm.encode("hello<tool>hello", add_special=False)
    assert [spm.token_of(token_id) for token_id in ids] == ["▁hello", "<tool>", "▁hello"]


def test_byte_level_added_tokens_are_cut_out_always(bpe):
    ids = bpe.encode("hello<think> hello", add_special=False)
    assert [bpe.token_of(token_id) for token_id in ids] == ["hello", "<think>", "Ġhello"]
    assert bpe.decode(ids) == "hello<think> hello"


def test_empty_text_has_no_ids_but_bos(spm, bpe):
    assert spm.encode("", add_special=False) == bpe.encode("", add_special=False) == []
    assert spm.encode("") == [1]
    assert bpe.encode("") == []  # its metadata asks for no BOS
    assert spm.decode([]) == ""
    assert spm.decode([1]) == ""


def test_names_and_ids_lead_to_each_other(tokenizer):
    for token_id in range(tokenizer.vocab_size):
        assert tokenizer.id_of(tokenizer.token_of(token_id)) == token_id
    assert tokenizer.id_of("no such token") is None
    assert tokenizer.token_of(tokenizer.vocab_size) is None
    assert tokenizer.token_of(-1) is None


@pytest.mark.parametrize("offset", [0, 10**6])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer, offset):
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        tokenizer.decode([tokenizer.vocab_size + offset])
    with pytest.raises(TokenizerError, match="token id -1 is outside"):
        tokenizer.stream().push(-1)


@pytest.mark.parametrize(
    ("text", "place"),
    [("\ud800", "U+D800 at index 0"), ("hello \udfff!", "U+DFFF at index 6")],
    ids=["alone", "inside"],
)
def test_lone_surrogates_are_refused_by_place(tokenizer, text, place):
    with pytest.raises(TokenizerError, match=re.escape(f"lone surrogate {place}")):
        tokenizer.encode(text)


def test_threads_with_different_settings_do_not_disturb_each_other(tokenizer):
    text = "hello<|im_end|>"
    expected = {flag: tokenizer.encode(text, parse_special=flag) for flag in (True, False)}
    assert expected[True] != expected[False]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns within one call, not only between calls
    try:
        with ThreadPoolExecutor(4) as pool:
            flags = [idx % 3 == 0 for idx in range(1500)]
            found = list(pool.map(lambda flag: tokenizer.encode(text, parse_special=flag), flags, chunksize=100))
    finally:
        sys.setswitchinterval(interval)
    assert found == [expected[flag] for flag in flags]


def test_saved_tokenizer_is_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    for name in ("vocab_size", "bos_id", "eos_id", "add_bos", "end_ids"):
        assert getattr(again, name) == getattr(tokenizer, name)
    for text in ("hello world", " hello<tool><think>hello<|im_end|> wörld 🦙\n", ""):
        for flags in ({}, {"parse_special": True}, {"add_special": False}):
            ids = tokenizer.encode(text, **flags)
            assert again.encode(text, **flags) == ids
            assert again.decode(ids) == tokenizer.decode(ids)
    again.save(tmp_path / "second")
    for path in tmp_path.glob("*.*"):
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes()
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


def test_extra_end_ids_of_a_saved_tokenizer_are_checked(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path, extra_end_ids=[5]).end_ids == tokenizer.end_ids | {5}
    with pytest.raises(TokenizerError, match="extra_end_ids: found 99999"):
        load_tokenizer(tmp_path, extra_end_ids=[99999])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2; this release reads 'hybrid-tokenizer' version 1"),
        ({"format": "other"}, "format 'other'"),
        ({"backend": "pickle"}, "backend: found 'pickle'; known are 'sentencepiece' and 'tokenizers'"),
        ({"bos_id": 10**6}, "bos_id: found 1000000, which is outside"),
        ({"end_ids": ["2"]}, "end_ids: found '2'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_damaged_settings_are_refused_by_field(tokenizer, tmp_path, change, message):
    tokenizer.save(tmp_path)
    path = tmp_path / SETTINGS_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(path) in str(caught.value)


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = (
        "import sys, hybrid_runtime.text.load, hybrid_runtime.text.chat\n"
        "print([name for name in ('torch', 'transformers', 'jinja2', 'google.protobuf') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
