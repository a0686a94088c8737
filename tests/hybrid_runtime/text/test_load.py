"""Checkpoint folders: which file counts, what the files around it add, and faults named by file and field."""

from __future__ import annotations

import json
import re

import pytest
import tokenizers

from hybrid_runtime.errors import TemplateError, TokenizerError
from hybrid_runtime.text.load import find_chat_template, load_tokenizer, load_tokenizer_file
from hybrid_runtime.text.saved_form import SETTINGS_FILE


def write(folder, **files):
    """Write files given as name=content; a name's double underscore stands for its dot."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")


@pytest.fixture
def bpe_folder(bpe, tmp_path):
    """A folder as Hugging Face has it: tokenizer.json only."""
    bpe.save(tmp_path)
    (tmp_path / SETTINGS_FILE).unlink()
    return tmp_path


@pytest.fixture
def spm_folder(spm, tmp_path):
    """A folder as older checkpoints have it: tokenizer.model only."""
    spm.save(tmp_path)
    (tmp_path / SETTINGS_FILE).unlink()
    return tmp_path


def edit(folder, change):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_the_end_of_tokenizer_and_of_configs_all_count(bpe_folder, bpe):
    write(
        bpe_folder,
        tokenizer_config__json={"eos_token": {"content": "<|endoftext|>"}, "bos_token": "<think>"},
        config__json={"eos_token_id": 2, "text_config": {"eos_token_id": 4}},
        generation_config__json={"eos_token_id": [3, 2]},
    )
    tokenizer = load_tokenizer(bpe_folder, extra_end_ids=[7])
    named = {bpe.id_of("<|endoftext|>"), bpe.id_of("<|im_end|>")}
    assert tokenizer.end_ids == {2, 3, 4, 7} | named
    assert tokenizer.eos_id == bpe.id_of("<|endoftext|>")
    assert tokenizer.bos_id == bpe.id_of("<think>")
    assert not tokenizer.add_bos


def test_configs_name_bos_and_eos_where_the_tokenizer_does_not(bpe_folder):
    write(bpe_folder, config__json={"bos_token_id": 5, "eos_token_id": [6, 7]})
    tokenizer = load_tokenizer(bpe_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (5, 6)
    assert {6, 7} <= tokenizer.end_ids


def test_the_template_of_tokenizer_json_decides_on_bos(bpe_folder, bpe):
    bos = bpe.id_of("<|endoftext|>")
    library = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>",
        special_tokens=[("<|endoftext|>", bos), ("<|im_end|>", bpe.id_of("<|im_end|>"))],
    )
    library.enable_truncation(2)
    library.enable_padding(length=50)
    library.save(str(bpe_folder / "tokenizer.json"))
    write(bpe_folder, tokenizer_config__json={"bos_token": "<|endoftext|>", "add_bos_token": False})
    tokenizer = load_tokenizer(bpe_folder)
    assert tokenizer.add_bos
    inner = bpe.encode("hello hello hello", add_special=False)
    assert tokenizer.encode("hello hello hello") == [bos, *inner, bpe.id_of("<|im_end|>")]
    assert tokenizer.encode("hello hello hello", add_special=False) == inner
    library = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    assert len(library.encode("hello hello hello").ids) == 50  # what the file's own settings would have done


def test_add_bos_token_counts_without_a_template(bpe_folder, bpe):
    write(bpe_folder, tokenizer_config__json={"bos_token": "<|endoftext|>", "add_bos_token": True})
    tokenizer = load_tokenizer(bpe_folder)
    assert tokenizer.add_bos
    assert tokenizer.encode("hello") == [bpe.id_of("<|endoftext|>"), *bpe.encode("hello")]


def test_add_bos_token_without_a_bos_is_refused(bpe_folder):
    write(bpe_folder, tokenizer_config__json={"add_bos_token": True})
    with pytest.raises(TokenizerError, match="add_bos_token is true, but no file names a bos_token"):
        load_tokenizer(bpe_folder)


def test_tokens_that_only_the_folder_defines_are_added(bpe_folder, bpe):
    write(bpe_folder, added_tokens__json={"<|user|>": bpe.vocab_size, "<|end|>": bpe.vocab_size + 1})
    write(bpe_folder, special_tokens_map__json={"additional_special_tokens": ["<|end|>"]})
    tokenizer = load_tokenizer(bpe_folder)
    assert tokenizer.vocab_size == bpe.vocab_size + 2
    assert bpe.vocab_size + 1 in tokenizer.end_ids
    assert tokenizer.encode("hello<|user|>", add_special=False)[-1] == bpe.vocab_size  # not special: always cut out
    assert bpe.vocab_size + 1 not in tokenizer.encode("hello<|end|>", add_special=False)
    assert tokenizer.encode("<|end|>", add_special=False, parse_special=True) == [bpe.vocab_size + 1]


def test_sentencepiece_folder_has_bos_and_chatml_ids_beyond_the_model(spm_folder, spm):
    im_end = spm.vocab_size + 1
    decoder = {
        str(spm.vocab_size): {"content": "<|user|>", "special": True, "lstrip": True, "rstrip": True},
        str(im_end): {"content": "<|eot_id|>", "special": True},
    }
    write(spm_folder, tokenizer_config__json={"added_tokens_decoder": decoder, "eos_token": "<|eot_id|>"})
    write(spm_folder, config__json={"eos_token_id": 2})
    tokenizer = load_tokenizer(spm_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, im_end, True)
    assert tokenizer.end_ids == {2, im_end, spm.id_of("<|im_end|>")}
    ids = tokenizer.encode("hello  <|user|>  hello<|eot_id|>", parse_special=True)
    assert [tokenizer.token_of(token_id) for token_id in ids] == ["<s>", "▁hello", "<|user|>", "hello", "<|eot_id|>"]
    tokenizer.save(spm_folder / "store")
    again = load_tokenizer(spm_folder / "store")
    assert again.encode("hello  <|user|>  hello<|eot_id|>", parse_special=True) == ids
    assert again.end_ids == tokenizer.end_ids


@pytest.mark.parametrize(
    ("config", "pieces"),
    [
        ({}, ["▁hello", "<|im_end|>", "hello"]),
        ({"legacy": False}, ["▁hello", "<|im_end|>", "hello"]),
        ({"legacy": True}, ["▁hello", "<|im_end|>", "▁hello"]),
        ({"add_prefix_space": False}, ["hello", "<|im_end|>", "hello"]),
    ],
    ids=["silent", "not-legacy", "legacy", "no-space"],
)
def test_the_folder_says_where_sentencepiece_puts_spaces(spm_folder, config, pieces):
    write(spm_folder, tokenizer_config__json=config)
    tokenizer = load_tokenizer(spm_folder)
    ids = tokenizer.encode("hello<|im_end|>hello", add_special=False, parse_special=True)
    assert [tokenizer.token_of(token_id) for token_id in ids] == pieces


def test_tokenizer_json_goes_before_tokenizer_model(spm_folder, bpe):
    bpe.save(spm_folder / "other")
    (spm_folder / "other" / "tokenizer.json").rename(spm_folder / "tokenizer.json")
    assert load_tokenizer(spm_folder).vocab_size == bpe.vocab_size


def test_vocab_json_with_merges_is_read_as_opt_publishes_it(bpe, bpe_metadata, tmp_path):
    tokens = bpe_metadata["tokenizer.ggml.tokens"]
    write(
        tmp_path,
        vocab__json={text: token_id for token_id, text in enumerate(tokens)},
        merges__txt="#version: 0.2\n" + "\n".join(bpe_metadata["tokenizer.ggml.merges"]) + "\n",
        tokenizer_config__json={
            "tokenizer_class": "GPT2Tokenizer",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "add_bos_token": True,
        },
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("hello world 🦙") == [tokenizer.bos_id, *bpe.encode("hello world 🦙")]
    assert tokenizer.bos_id in tokenizer.end_ids
    write(tmp_path, merges__txt="h e x\n")
    with pytest.raises(TokenizerError, match=r"merges\.txt: line 1: found 'h e x'"):
        load_tokenizer(tmp_path)
    write(tmp_path, tokenizer_config__json={"tokenizer_class": "BertTokenizer"})
    with pytest.raises(TokenizerError, match="tokenizer_class: found 'BertTokenizer'"):
        load_tokenizer(tmp_path)


def test_a_single_file_of_any_name_is_enough(spm_folder, bpe_folder, bpe):
    model = (spm_folder / "tokenizer.model").rename(spm_folder / "tekken.v17")
    assert load_tokenizer_file(model).bos_id == 1
    assert load_tokenizer_file(bpe_folder / "tokenizer.json").encode("hello") == bpe.encode("hello")


FOLDER_FAULTS = {
    "config-not-json": ({"config__json": "{"}, "config.json is not JSON"),
    "config-deep": ({"config__json": '{"a":' * 10**5}, "config.json is nested too deeply"),
    "config-bom": ({"config__json": "\ufeff{}"}, "config.json is not JSON"),
    "config-list": ({"config__json": []}, "config.json is a JSON list, expected an object"),
    "config-eos-text": ({"config__json": {"eos_token_id": "2"}}, "config.json: eos_token_id: found '2'"),
    "config-eos-outside": (
        {"config__json": {"eos_token_id": 266}},
        "config.json: eos_token_id: found 266, which is out",
    ),
    "generation-eos": ({"generation_config__json": {"eos_token_id": [1, -1]}}, "generation_config.json: eos_token_id"),
    "bos-unknown": (
        {"tokenizer_config__json": {"bos_token": "<nope>"}},
        "tokenizer_config.json: bos_token: found '<nope>', which is not in the vocabulary",
    ),
    "eos-number": ({"special_tokens_map__json": {"eos_token": 2}}, "special_tokens_map.json: eos_token: found 2"),
    "flag": ({"tokenizer_config__json": {"add_bos_token": "yes"}}, "add_bos_token: found 'yes'; expected true or"),
    "added-id-text": ({"added_tokens__json": {"<x>": "300"}}, "added_tokens.json: '<x>': found '300'"),
    "added-collides": (
        {"added_tokens__json": {"<x>": 5}},
        "added token '<x>' has id 5, which is '&' in the vocabulary",
    ),
    "added-far": ({"added_tokens__json": {"<x>": 999}}, "added token '<x>' has id 999, but the next free id is 266"),
    "added-twice": ({"added_tokens__json": {"<x>": 266, "<y>": 266}}, "'<y>' (id 266) collides with '<x>' (id 266)"),
    "added-empty": ({"added_tokens__json": {"": 266}}, "added token 266 has an empty text"),
    "decoder-key": (
        {"tokenizer_config__json": {"added_tokens_decoder": {"x": {"content": "<x>"}}}},
        "added_tokens_decoder['x']: expected an id",
    ),
    "decoder-list": ({"tokenizer_config__json": {"added_tokens_decoder": [1]}}, "added_tokens_decoder: found [1]"),
    "key-twice": (
        {"config__json": '{"eos_token_id": 1, "eos_token_id": 2}'},
        "config.json has key 'eos_token_id' twice",
    ),
}


@pytest.mark.parametrize(("files", "message"), FOLDER_FAULTS.values(), ids=FOLDER_FAULTS.keys())
def test_faults_around_a_tokenizer_name_the_file_and_the_field(bpe_folder, files, message):
    write(bpe_folder, **files)
    with pytest.raises(TokenizerError, match=re.escape(message)) as caught:
        load_tokenizer(bpe_folder)
    assert str(bpe_folder) in str(caught.value)


WORD_PIECE = {"type": "WordPiece", "prefix": "##", "cleanup": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"]["vocab"].update({"h": 3}), "model.vocab: '$' and 'h' share the id 3"),
        (lambda c: c["model"]["vocab"].update({"h": "3"}), "model.vocab['h']: found \"3\"; expected an id"),
        (lambda c: c["model"].pop("vocab"), "model.vocab: expected an object"),
        (lambda c: c["model"].pop("merges"), "not a tokenizer that tokenizers can read"),
        (
            lambda c: c["model"].update(merges=[["h", "日"]]),
            "not a tokenizer that tokenizers can read: Token `日` out of",
        ),
        (lambda c: c.update(decoder=WORD_PIECE), "decoder: found WordPiece; known are ByteLevel"),
        (lambda c: c.update(decoder=None), "decoder: found none; known are ByteLevel"),
        (
            lambda c: c["added_tokens"][0].update(id=7),
            "added_tokens[0] '<|endoftext|>' has id 7, which collides with '('",
        ),
        (lambda c: c.update(added_tokens={}), "not a tokenizer that tokenizers can read: invalid type: map"),
        (lambda c: c.update(added_tokens=None), "not a tokenizer that tokenizers can read: invalid type: null"),
        (lambda c: c["added_tokens"][0].update(id="7"), "not a tokenizer that tokenizers can read: invalid type"),
    ],
    ids=[
        "ids",
        "id-type",
        "vocab",
        "merges",
        "merge",
        "decoder",
        "no-decoder",
        "added",
        "added-map",
        "added-null",
        "added-type",
    ],
)
def test_faults_in_tokenizer_json_name_the_field(bpe_folder, change, message):
    edit(bpe_folder, change)
    with pytest.raises(TokenizerError, match=re.escape(message)) as caught:
        load_tokenizer(bpe_folder)
    assert str(bpe_folder / "tokenizer.json") in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_file_cut_short_is_refused(spm_folder, bpe_folder, name, share):
    path = spm_folder / name
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(TokenizerError, match=re.escape(str(path))):
        load_tokenizer_file(path)


def test_json_in_another_encoding_is_refused(bpe_folder):
    path = bpe_folder / "tokenizer.json"
    path.write_bytes(path.read_text().encode("utf-16"))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not UTF-8 at byte"):
        load_tokenizer(bpe_folder)


def test_an_added_token_on_a_sentencepiece_piece_is_refused(spm_folder):
    write(spm_folder, added_tokens__json={"<x>": 3})
    with pytest.raises(TokenizerError, match="added token '<x>' has id 3, which is '<0x00>' in the vocabulary"):
        load_tokenizer(spm_folder)


def test_a_folder_without_a_tokenizer_says_what_was_expected(tmp_path):
    with pytest.raises(
        TokenizerError, match=r"no tokenizer found; expected tokenizer\.json, tokenizer\.model, or vocab"
    ):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="not a folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(TokenizerError, match="cannot be read: No such file"):
        load_tokenizer_file(tmp_path / "absent.json")


def test_chat_templates_are_found_where_checkpoints_keep_them(tmp_path):
    assert find_chat_template(tmp_path) is None
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    write(tmp_path, tokenizer_config__json={"chat_template": named})
    assert find_chat_template(tmp_path) == "D"
    write(tmp_path, tokenizer_config__json={"chat_template": named[:1]})
    assert find_chat_template(tmp_path) is None
    write(tmp_path, tokenizer_config__json={"chat_template": "S"})
    assert find_chat_template(tmp_path) == "S"
    write(tmp_path, chat_template__jinja="J")
    assert find_chat_template(tmp_path) == "J"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TemplateError, match=r"chat_template\.jinja: cannot be read as UTF-8"):
        find_chat_template(tmp_path)


@pytest.mark.parametrize("template", [7, [7], [{"name": "default"}]], ids=["number", "list", "no-template"])
def test_a_chat_template_of_another_type_is_refused(tmp_path, template):
    write(tmp_path, tokenizer_config__json={"chat_template": template})
    with pytest.raises(TemplateError, match=r"tokenizer_config\.json: chat_template"):
        find_chat_template(tmp_path)
