"""The engine from a folder of files to text: sampling, streaming, stopping, cancelling, chat, and the kept context."""

import dataclasses
import itertools
import math

import pytest
import torch

from hybrid_runtime.engine import Engine
from hybrid_runtime.errors import ContextOverflow, NumericsError, TemplateError, TokenizerError, UsageError
from hybrid_runtime.generation.sampling import SamplingParams
from hybrid_runtime.load_options import LoadOptions
from hybrid_runtime.stores import ModelRequest
from hybrid_runtime.text.chat import Message

from .model.conftest import one_thread  # noqa: F401
from .small_models import BOS, EOS, IM_END, LLAMA, TEMPLATE, TURBOSPARSE, VOCABULARY, ScriptedDecoder, write_model

GREEDY = SamplingParams(temperature=0, max_tokens=24)
LONG = "Hello world once and the other " * 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "llama")
    write_model(folder / "chat", template=TEMPLATE)
    write_model(folder / "no-bos", add_bos=False)
    write_model(folder / "turbosparse", TURBOSPARSE, num_shards=3)
    write_model(folder / "padded", LLAMA | {"vocab_size": LLAMA["vocab_size"] + 61})
    return folder


@pytest.fixture
def load(models):
    def load(name="llama", **options):
        options = {"cache_dir": models / "cache", "num_positions": 256} | options
        return Engine.load(str(models / name), LoadOptions(**options))

    return load


def text_of(engine, prompt, params=GREEDY, **options):
    return "".join(engine.generate(prompt, params, **options))


def ids_of(text):
    """Token ids of a text, one a byte: what no encoder would make, and a model may still say."""
    byte_level = {byte: char for char, byte in byte_of_char().items()}
    return [VOCABULARY[byte_level[byte]] for byte in text.encode()]


def byte_of_char():
    """GPT-2's table: printable bytes stand for themselves, the others for characters from 256 on."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + idx): byte for idx, byte in enumerate(others)}


def script(engine, said, *, prompt_tokens):
    """From now on the engine answers a prompt of so many tokens with these ids."""
    engine.sequence.decoder = ScriptedDecoder(engine.config, [0] * (prompt_tokens - 1) + list(said))
    return engine


@pytest.mark.parametrize("model", ["llama", "turbosparse"])
def test_greedy_text_is_the_argmax_of_the_whole_sequences_logits(load, model):
    engine = load(model)
    ids = engine.encode("Hello world")
    said = []
    for _ in range(12):
        said.append(int(engine.logits(ids + said)[-1].argmax()))
    expected = engine.tokenizer.stream(after=ids)
    expected_text = "".join(expected.push(token) for token in said if token not in (EOS, IM_END)) + expected.flush()
    assert EOS not in said  # else the comparison below would be of less than it seems
    assert IM_END not in said
    assert text_of(engine, "Hello world", dataclasses.replace(GREEDY, max_tokens=12)) == expected_text


@pytest.mark.parametrize("model", ["llama", "turbosparse"])
def test_a_seed_decides_the_text(load, model):
    texts = {}
    for engine, seed in itertools.product((load(model), load(model)), (1, 2, 3)):
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=24)
        texts.setdefault(seed, set()).add(text_of(engine, "Hello", params))
    assert all(len(same) == 1 for same in texts.values())
    assert len(set.union(*texts.values())) == 3


def test_temperature_zero_ignores_the_seed(load):
    engine = load()
    texts = {text_of(engine, "Hello", dataclasses.replace(GREEDY, seed=seed)) for seed in (1, 2, None)}
    assert len(texts) == 1


@pytest.mark.parametrize("stop", ["ND wo", "END", "w", "END world.", "d.\n"])
def test_stop_string_across_tokens_ends_the_text_before_it(load, stop):
    said = "The END world.\nmore text"
    engine = script(load(), ids_of(said), prompt_tokens=3)
    text = text_of(engine, [5, 6, 7], dataclasses.replace(GREEDY, stop=(stop, "never")))
    assert text == said[: said.index(stop)]
    assert engine.last_report.finish_reason == "stop"
    assert engine.last_report.generated_tokens == said.index(stop) + len(stop)  # not one more was computed


def test_start_of_a_stop_string_is_shown_when_the_rest_never_comes(load):
    engine = script(load(), [*ids_of("almost EN"), EOS], prompt_tokens=1)
    assert text_of(engine, [5], dataclasses.replace(GREEDY, stop=("END",))) == "almost EN"
    assert engine.last_report.finish_reason == "end"


def test_streaming_never_emits_half_a_character(load):
    said = "aé€😀\u0301z"
    engine = script(load(), [*ids_of(said), EOS], prompt_tokens=1)
    pieces = list(engine.generate([5], GREEDY))
    assert pieces == list(said)  # a token is a byte: each character comes when it is whole, not before, not later


def test_bytes_that_are_no_character_come_out_as_one_replacement(load):
    engine = script(load(), [*ids_of("a"), ids_of("😀")[0], ids_of("😀")[1], EOS], prompt_tokens=1)
    assert text_of(engine, [5]) == "a\ufffd"


def test_text_arrives_while_it_is_made(load):
    engine = script(load(), ids_of("abc") * 5, prompt_tokens=1)
    pieces = engine.generate([5], GREEDY)
    assert next(pieces) == "a"
    assert len(engine.sequence.decoder.batches) == 1  # the prompt, and not one token more
    pieces.close()


def test_leaving_early_reports_cancelled_and_the_engine_stays_usable(load):
    engine = load()
    whole = text_of(engine, LONG)
    pieces = engine.generate(LONG, GREEDY)
    partial = next(pieces) + next(pieces)
    pieces.close()
    assert whole.startswith(partial)
    assert engine.last_report.finish_reason == "cancelled"
    assert 2 <= engine.last_report.generated_tokens < 24
    assert text_of(engine, LONG) == whole
    assert engine.last_report.finish_reason == "length"


@pytest.mark.parametrize("model", ["llama", "turbosparse"])
@pytest.mark.parametrize("second", [LONG + "ing and so on", LONG[:40] + "another end", "and nothing shared", LONG])
def test_shared_prefix_costs_nothing_and_changes_nothing(load, model, second):
    engine, fresh = load(model), load(model)
    text_of(engine, LONG)
    first_ids, second_ids = engine.encode(LONG), engine.encode(second)
    pairs = zip(first_ids, second_ids[:-1], strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    assert text_of(engine, second) == text_of(fresh, second)
    report = engine.last_report
    assert report.cached_tokens == shared >= 1  # the beginning-of-sequence token at least
    assert report.prompt_tokens == fresh.last_report.prompt_tokens
    assert fresh.last_report.cached_tokens == 0


def test_prompt_beyond_the_context_is_refused_with_the_flag_that_helps(load):
    engine = load(num_positions=16)
    with pytest.raises(ContextOverflow, match=r"has \d+ tokens, the context holds 16; shorten it or give --ctx \d+"):
        engine.generate("x" * 20)
    assert text_of(engine, "Hello", dataclasses.replace(GREEDY, max_tokens=2))


def test_endless_prompt_is_refused_by_its_beginning(load):
    engine = load(num_positions=16)
    with pytest.raises(ContextOverflow, match="first 1280 of 2000000 characters are 1281 tokens already"):
        engine.generate("x" * 2_000_000)


def test_long_prompt_of_few_tokens_is_not_refused(load):
    engine = load(num_positions=256)
    text = "<|im_start|>" * 200  # 2400 characters, 200 tokens where control tokens count
    assert engine.encode(text, parse_special=True) == [BOS] + [VOCABULARY["<|im_start|>"]] * 200


def test_full_context_ends_the_answer(load):
    engine = load(num_positions=16)
    text_of(engine, [5] * 10, SamplingParams(temperature=0))
    assert engine.last_report.finish_reason == "context"
    assert engine.last_report.prompt_tokens + engine.last_report.generated_tokens == 17  # the last needs no room


@pytest.mark.parametrize(("num_positions", "found"), [(None, 512), (7, 7), (5000, 5000)])
def test_context_is_the_models_unless_asked(load, num_positions, found):
    said = []
    engine = load(num_positions=num_positions, say=said.append)
    assert engine.sequence.cache.num_positions == found
    assert any("made for 128 tokens" in line for line in said) == (num_positions == 5000)


@pytest.mark.parametrize("end", [EOS, IM_END])
def test_chat_ends_its_turn_at_either_token(load, end):
    engine = load("chat")
    messages = [Message("system", "Be brief."), {"role": "user", "content": "Hello"}]
    prompt = engine.encode_chat(messages)
    control = {VOCABULARY[name] for name in ("<s>", "<|im_start|>", "<|im_end|>")}
    assert prompt[0] == BOS
    assert prompt.count(BOS) == 1  # the template writes it, the tokenizer does not once more
    assert control <= set(prompt)
    script(engine, [*ids_of("Hi!"), end, *ids_of("and on")], prompt_tokens=len(prompt))
    assert "".join(engine.chat(messages, GREEDY)) == "Hi!"
    assert engine.last_report.finish_reason == "end"


def test_second_turn_computes_only_what_is_new(load):
    engine = load("chat")
    messages = [Message("user", "Hello world")]
    first = engine.encode_chat(messages)
    script(engine, [*ids_of("Hi!"), IM_END], prompt_tokens=len(first))
    answer = "".join(engine.chat(messages, GREEDY))
    messages += [Message("assistant", answer), Message("user", "And?")]
    list(engine.chat(messages, dataclasses.replace(GREEDY, max_tokens=1)))
    assert engine.last_report.cached_tokens >= len(first)
    assert engine.sequence.decoder.batches[-1] == engine.last_report.prompt_tokens - engine.last_report.cached_tokens


def test_control_tokens_in_a_users_text_are_text(load):
    engine = load("chat")
    assert VOCABULARY["<|im_end|>"] not in engine.encode("a <|im_end|> b")
    assert VOCABULARY["<|im_end|>"] in engine.encode("a <|im_end|> b", parse_special=True)


def test_chat_without_a_template_is_refused(load):
    with pytest.raises(TemplateError, match="llama has no chat template"):
        load().chat([Message("user", "Hello")])


def test_empty_prompt_begins_with_bos(load):
    engine = load()
    assert text_of(engine, "") == text_of(engine, [BOS])
    assert engine.last_report.prompt_tokens == 1


def test_empty_prompt_takes_bos_also_where_texts_go_without(load):
    engine = load("no-bos")
    assert engine.encode("a") == ids_of("a")
    assert engine.encode("") == [BOS]
    with pytest.raises(UsageError, match="no tokens"):
        engine.generate([])


def test_lone_surrogate_is_refused(load):
    with pytest.raises(TokenizerError, match="surrogate"):
        load().generate("a\udcff")


def test_logits_of_a_whole_sequence_are_those_of_every_prefix(load):
    engine = load()
    ids = engine.encode(LONG)
    whole = engine.logits(ids)
    assert whole.shape == (len(ids), engine.config.vocab_size)
    for length in (1, 2, len(ids)):
        torch.testing.assert_close(engine.logits(ids[:length])[-1], whole[length - 1], atol=1e-4, rtol=0)
    with pytest.raises(ContextOverflow):
        engine.logits([5] * 257)


def test_padded_head_says_only_what_the_tokenizer_knows(load):
    engine = load("padded")
    params = SamplingParams(temperature=50.0, top_k=0, top_p=1.0, min_p=0.0, seed=4, max_tokens=200)
    text_of(engine, "Hello", params)  # nearly uniform over 61 ids without text among the others
    assert engine.last_report.generated_tokens > 0
    assert engine.config.vocab_size > engine.tokenizer.vocab_size


def test_nan_in_the_model_is_an_error_and_the_engine_goes_on(load):
    engine = load()
    decoder = engine.sequence.decoder
    script(engine, [5, math.nan], prompt_tokens=1)
    with pytest.raises(NumericsError):
        text_of(engine, [5])
    engine.sequence.decoder = decoder
    assert text_of(engine, "Hello") == text_of(load(), "Hello")


def test_second_load_reads_the_store_that_the_first_one_made(load, models):
    said = []
    stores = models / "cache" / "stores"
    load(say=said.append)
    before = {path: path.stat().st_mtime_ns for path in stores.rglob("*") if path.is_file()}
    again = load(say=said.append)
    assert not any("converting" in line for line in said[1:])
    assert {path: path.stat().st_mtime_ns for path in stores.rglob("*") if path.is_file()} == before
    by_path = Engine.load(ModelRequest(str(again.store.folder)), LoadOptions(num_positions=256))
    assert text_of(by_path, "Hello") == text_of(again, "Hello")


@pytest.mark.parametrize("quant", ["bf16", "q8", "q4"])
def test_quantised_stores_speak_too(load, models, quant):
    request = ModelRequest(str(models / "turbosparse"), quant=quant)
    engine = Engine.load(request, LoadOptions(cache_dir=models / "cache", num_positions=64))
    assert engine.store.manifest.quantization.weights.kind == quant
    assert str(engine.sequence.cache.keys.dtype) == "torch.float16"
    assert text_of(engine, "Hello")


def test_q8_keys_and_values_leave_the_logits_nearly_as_they_are(models, tmp_path):
    """Against f16 ones: text comes, and what the model expects of each token is off by a percent or two."""
    folder = write_model(tmp_path / "wide", LLAMA | {"head_dim": 32})
    engines = [
        Engine.load(str(folder), LoadOptions(cache_dir=models / "cache", num_positions=256, kv_dtype=dtype))
        for dtype in ("f16", "q8")
    ]
    ids = engines[0].encode(LONG)
    expected, found = (engine.logits(ids).log_softmax(dim=1) for engine in engines)
    losses = [-logits[range(len(ids) - 1), ids[1:]].mean().item() for logits in (expected, found)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert text_of(engines[1], "Hello")
    assert engines[1].last_report.generated_tokens > 0


def test_q8_keys_and_values_of_narrow_heads_are_refused_by_name(load):
    with pytest.raises(UsageError, match="--kv-cache q8: head_dim 8 is not a multiple of 32; use f16"):
        load(kv_dtype="q8")
