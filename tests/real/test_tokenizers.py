"""Tokenizers against published vectors: llama.cpp's for GGUF vocabularies, Mistral's for theirs, and each other."""

from __future__ import annotations

import importlib
import json
import time

import pytest
import sentencepiece
import tokenizers
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from real.data import shared_data

from hybrid_runtime.text.bpe_splits import bpe_split
from hybrid_runtime.text.load import load_tokenizer, load_tokenizer_file, tokenizer_from_gguf

LLAMACPP_VOCABS = ("llama-spm", "gpt-2")
MISTRAL_FILES = {
    "mistral-v1": ("tokenizer.model.v1", "v1"),
    "mistral-v3": ("mistral_instruct_tokenizer_240323.model.v3", "v3"),
    "mistral-v3-hf": ("hf-Mistral-7B-v0.3/tokenizer.json", "v3"),
}
ALL = (*LLAMACPP_VOCABS, *MISTRAL_FILES, "stories260K")


def gguf_tokenizer(path):
    metadata = {key: field.contents() for key, field in GGUFReader(path).fields.items()}
    return tokenizer_from_gguf(metadata, file=str(path))


def load(name):
    if name in MISTRAL_FILES:
        return load_tokenizer_file(shared_data(f"tokenizers/mistral/{MISTRAL_FILES[name][0]}"))
    if name == "stories260K":
        return gguf_tokenizer(shared_data("models/stories260K/stories260K-f32.gguf"))
    return gguf_tokenizer(shared_data(f"tokenizers/llamacpp-vocab/ggml-vocab-{name}.gguf"))


@pytest.fixture(scope="module")
def tokenizer_of():
    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = load(name)
        return loaded[name]

    return get


def vectors(name):
    path = shared_data(f"tokenizers/llamacpp-vocab/ggml-vocab-{name}.gguf")
    texts = path.with_name(f"{path.name}.inp").read_text().split("\n__ggml_vocab_test__\n")
    assert texts.pop() == ""  # a separator ends the file
    ids = [[int(token_id) for token_id in line.split()] for line in path.with_name(f"{path.name}.out").open()]
    assert len(texts) == len(ids) == 46
    return list(zip(texts, ids, strict=True))


def mistral_samples(version):
    folders = sorted(shared_data("tokenizers/mistral/samples").iterdir())
    found = [folder for folder in folders if (folder / f"text_{version}.txt").exists()]
    assert found
    return found


def mistral_text(folder, version):
    """The published text; it shows spaces and line ends as the pieces do."""
    text = (folder / f"text_{version}.txt").read_text()
    return text.replace("▁", " ").replace("<0x0A>", "\n")


def mistral_ids(folder, version):
    return json.loads((folder / f"tokens_{version}.json").read_text())["tokens"]


def multilingual(start, stop):
    return shared_data("text/exl2_cal/multilingual.txt").read_text(encoding="utf-8")[start:stop]


def returned(name, text):
    """What a text decodes to: Mistral's tokenizer.json takes a first space for the one that it would have added."""
    return text.removeprefix(" ") if name == "mistral-v3-hf" else text


@pytest.mark.parametrize("name", LLAMACPP_VOCABS)
def test_llamacpp_vectors_give_the_published_ids_and_come_back(tokenizer_of, name):
    tokenizer = tokenizer_of(name)
    for text, ids in vectors(name):
        assert tokenizer.encode(text, add_special=False) == ids, text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", LLAMACPP_VOCABS)
def test_llamacpp_vectors_stream_whole_characters(tokenizer_of, name):
    tokenizer = tokenizer_of(name)
    for text, ids in vectors(name):
        stream = tokenizer.stream()
        chunks = [stream.push(token_id) for token_id in ids]
        assert "".join(chunks) == text
        assert stream.flush() == ""
        assert not any("\ufffd" in chunk for chunk in chunks)


@pytest.mark.parametrize("name", MISTRAL_FILES)
def test_mistral_samples_give_the_published_ids(tokenizer_of, name):
    tokenizer, version = tokenizer_of(name), MISTRAL_FILES[name][1]
    for folder in mistral_samples(version):
        text = mistral_text(folder, version)
        assert tokenizer.encode(text, add_special=False, parse_special=True) == mistral_ids(folder, version)


@pytest.mark.parametrize("name", MISTRAL_FILES)
def test_mistral_samples_stream_to_what_they_decode_to(tokenizer_of, name):
    tokenizer, version = tokenizer_of(name), MISTRAL_FILES[name][1]
    for folder in mistral_samples(version):
        ids = mistral_ids(folder, version)
        stream = tokenizer.stream()
        streamed = "".join(stream.push(token_id) for token_id in ids) + stream.flush()
        assert streamed == tokenizer.decode(ids)
        control = [tokenizer.token_of(token_id) for token_id in set(ids) if tokenizer.vocabulary.is_added(token_id)]
        expected = mistral_text(folder, version)
        for token in control:
            expected = expected.replace(token, "")
        assert streamed == expected.removeprefix(" ")


def test_tokenizer_json_and_sentencepiece_agree_on_mistral_v3(tokenizer_of):
    model, fast = tokenizer_of("mistral-v3"), tokenizer_of("mistral-v3-hf")
    assert (model.vocab_size, model.bos_id, model.add_bos, model.end_ids) == (32768, 1, True, {2})
    assert (fast.vocab_size, fast.bos_id, fast.add_bos, fast.end_ids) == (32768, 1, True, {2})
    texts = [text for text, _ in vectors("llama-spm")] + [multilingual(0, 30_000)]
    assert any(text.startswith(" ") for text in texts)
    for text in texts:
        # tokenizers adds no space to a text that begins with one, so there the two are one space apart
        same_pieces = model.encode(text.removeprefix(" ")) if text != " " else [1, model.id_of("▁")]
        assert fast.encode(text) == same_pieces, text[:60]


@pytest.mark.parametrize("name", ["mistral-v1", "mistral-v3"])
def test_sentencepiece_itself_encodes_and_decodes_the_same(tokenizer_of, name):
    path = shared_data(f"tokenizers/mistral/{MISTRAL_FILES[name][0]}")
    library, tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path)), tokenizer_of(name)
    for text in [*(text for text, _ in vectors("llama-spm")), multilingual(30_000, 50_000)]:
        ids = library.encode(text)
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.decode(ids) == library.decode(ids)


@pytest.mark.parametrize("name", ["mistral-v3-hf", "gpt-2"])
def test_tokenizers_itself_decodes_the_same(tokenizer_of, name, tmp_path):
    tokenizer = tokenizer_of(name)
    tokenizer.save(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*(text for text, _ in vectors("gpt-2")), multilingual(30_000, 50_000)]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True)
        assert library.encode(text).ids == ids


def test_llama_spm_model_file_is_what_sentencepiece_would_have_trained(tokenizer_of, tmp_path):
    """The model written by hand from GGUF metadata says to sentencepiece what the metadata says."""
    tokenizer = tokenizer_of("llama-spm")
    tokenizer.save(tmp_path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert (library.get_piece_size(), library.unk_id(), library.bos_id(), library.eos_id()) == (32000, 0, 1, 2)
    assert library.is_byte(3)
    assert library.is_control(1)
    for text, ids in vectors("llama-spm"):
        assert library.encode(text) == ids


@pytest.mark.parametrize("name", ALL)
def test_saved_tokenizers_encode_and_decode_the_same(tokenizer_of, name, tmp_path):
    tokenizer = tokenizer_of(name)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    texts = [*(text for text, _ in vectors("gpt-2")), multilingual(0, 20_000), "<s>[INST] hi[/INST]</s><|endoftext|> x"]
    for text in texts:
        for flags in ({}, {"add_special": False}, {"parse_special": True}):
            ids = tokenizer.encode(text, **flags)
            assert again.encode(text, **flags) == ids
            assert again.decode(ids) == tokenizer.decode(ids)
    for field in ("vocab_size", "bos_id", "eos_id", "add_bos", "end_ids"):
        assert getattr(again, field) == getattr(tokenizer, field)


@pytest.mark.parametrize("name", ALL)
def test_real_text_survives_the_round_trip(tokenizer_of, name):
    tokenizer = tokenizer_of(name)
    for text in (multilingual(0, 20_000), shared_data("text/exl2_cal/code.txt").read_text(encoding="utf-8")[:20_000]):
        assert "▁" not in text  # sentencepiece writes a space so, and gives one back
        assert tokenizer.decode(tokenizer.encode(text)) == returned(name, text)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_streams_of_real_vocabularies_equal_decoding(tokenizer_of, name, data):
    tokenizer = tokenizer_of(name)
    text = data.draw(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30))
    some_ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=8))
    for ids, expected in (
        (tokenizer.encode(text), returned(name, text)),
        (some_ids, tokenizer.decode(some_ids)),
    ):
        stream = tokenizer.stream()
        chunks = [*(stream.push(token_id) for token_id in ids), stream.flush()]
        assert "".join(chunks) == expected
        assert "".join(chunks).count("\ufffd") == expected.count("\ufffd")


def test_stories260k_tokenises_its_published_text_and_gives_it_back(tokenizer_of):
    tokenizer = tokenizer_of("stories260K")
    published = json.loads(shared_data("models/stories260K/expected.json").read_text())["published_text"]
    ids = tokenizer.encode(published)
    assert tokenizer.vocab_size == 512
    assert ids[0] == tokenizer.bos_id == 1
    assert tokenizer.decode(ids) == published
    # the vocabulary was trained on such stories: about two characters a token, and no byte tokens but the line ends
    assert len(ids) < len(published) / 2
    names = {tokenizer.token_of(token_id) for token_id in ids}
    assert {name for name in names if name.startswith("<0x")} <= {"<0x0A>"}


@pytest.mark.parametrize("file", ["stories260K-Q8_0.gguf", "stories260K-Q4_0.gguf"])
def test_stories260k_files_hold_one_vocabulary(tokenizer_of, file):
    other = gguf_tokenizer(shared_data(f"models/stories260K/{file}"))
    text = shared_data("text/tinystories_train_2MB.txt").read_text(encoding="utf-8")[:20_000]
    assert other.encode(text) == tokenizer_of("stories260K").encode(text)


@pytest.mark.parametrize("name", ["llama-spm", "mistral-v3", "mistral-v3-hf", "gpt-2"])
@pytest.mark.parametrize("kind", ["prose", "one-letter", "spaces", "llamas"])
def test_a_prompt_of_a_megabyte_is_encoded_within_seconds(tokenizer_of, name, kind):
    prose = shared_data("text/tinyshakespeare.txt").read_text()[:1_000_000]
    text = {"prose": prose, "one-letter": "a" * 1_000_000, "spaces": " " * 1_000_000, "llamas": "🦙" * 250_000}[kind]
    tokenizer = tokenizer_of(name)
    start = time.monotonic()
    ids = tokenizer.encode(text, parse_special=True)
    elapsed = time.monotonic() - start
    assert elapsed < 10.0  # about 1 s alone; linear, and a quadratic one would take hours
    assert tokenizer.decode(ids) == returned(name, text)


def test_qwen2_files_are_cut_into_words_as_transformers_does():
    module = importlib.import_module("transformers.models.qwen2.tokenization_qwen2")
    assert bpe_split("qwen2", file="").patterns == (module.PRETOKENIZE_REGEX,)
