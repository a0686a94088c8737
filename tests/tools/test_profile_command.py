"""hybrid-profile: what it prints, what it refuses, and what a second run finds."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_runtime.profiling import run as run_module
from hybrid_runtime.profiling.profile_file import read_profile
from hybrid_runtime.profiling.run import HELD_OUT_EVERY, WORK
from hybrid_runtime.shipped import SHIPPED_TEXT
from hybrid_runtime.store.reader import open_store
from hybrid_tools.convert import main as convert
from hybrid_tools.profile import LongSteps, main
from tests.hybrid_runtime.profiling.conftest import Heard
from tests.hybrid_runtime.small_models import LLAMA, write_model

DENSE = LLAMA | {"architectures": ["BambooForCausalLM"], "model_type": "bamboo", "hidden_act": "relu"}
TEXT = "Hello world, once upon a time there was a neuron and the others and a layer. "
OPTIONS = ("--window", "16", "--tokens", "320", "--samples", "2000", "--threads", "1")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "checkpoint", DENSE)
    assert convert([str(folder / "checkpoint"), "-o", str(folder / "store")]) == 0
    for name in ("text", "other"):
        (folder / name).write_text("".join(f"{name} {idx} {TEXT}" for idx in range(20)))
    return folder


@pytest.fixture
def store(made, tmp_path):
    return shutil.copytree(made / "store", tmp_path / "store")


@pytest.fixture
def run(capfd):
    def run(*arguments):
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


@pytest.fixture
def refused(run):
    """Runs what must be refused: exit code 2, nothing on stdout, and one line that is returned."""

    def refused(*arguments):
        code, out, err = run(*arguments)
        assert code == 2, err
        assert out == ""
        (line,) = [line for line in err if line.startswith("hybrid-profile: ")]
        assert line == err[-1]
        assert not any("Traceback" in line for line in err)
        return line

    return refused


def test_help_says_units_and_defaults_of_every_option(run):
    code, out, _ = run("--help")
    assert code == 0
    text = " ".join(out.split())
    for words in (
        "Tokens to count; 0: all of the text",
        "default: 200000",
        "[default: 512; 2<=x<=65536]",
        "[default: 256M]",
        "[default: with the model's store]",
        "[default: physical cores]",
        "Forget an unfinished run",
    ):
        assert words in text


def test_profile_lies_with_the_store_and_is_said(store, made, run):
    code, out, err = run(store, "--text", made / "text", *OPTIONS)
    assert code == 0, err
    assert out == f"{store / 'profile'}\n"
    assert re.fullmatch(r"checkpoint: 320 tokens, \d+\.\d % of the values are zero", err[-2])
    assert re.fullmatch(r"by layer, %: \d+\.\d \d+\.\d", err[-1])
    assert any(line.startswith("profiling checkpoint: 320 tokens") for line in err)
    assert any("320 tokens of 320 tokens (100 %)" in line for line in err)
    profile = read_profile(store / "profile", open_store(store).manifest.config)
    assert profile.num_tokens == 320
    assert len(profile.held_out) == 320 // 16 // HELD_OUT_EVERY


def test_json_is_one_object_of_numbers(store, made, tmp_path, run):
    code, out, err = run(store, "--text", made / "text", *OPTIONS, "-o", tmp_path / "mine", "--json")
    assert code == 0, err
    (line,) = out.splitlines()
    values = json.loads(line)
    assert values["model"] == "checkpoint"
    assert values["folder"] == str(tmp_path / "mine")
    assert values["num_tokens"] == 320
    assert len(values["texts"]) == 1
    assert len(values["zero_share_by_layer"]) == DENSE["num_hidden_layers"]
    assert values["zero_share"] == pytest.approx(sum(values["zero_share_by_layer"]) / 2)
    assert not (store / "profile").exists()


def test_second_run_says_that_it_was_there_and_restart_does_it_again(store, made, run, monkeypatch):
    arguments = (store, "--text", made / "text", *OPTIONS)
    assert run(*arguments)[0] == 0
    before = (store / "profile" / "profile.json").read_bytes()
    counted = []
    after = run_module._Run._after
    monkeypatch.setattr(run_module._Run, "_after", lambda *each: counted.append(each) or after(*each))
    code, out, err = run(*arguments)
    assert code == 0
    assert out == f"{store / 'profile'}\n"
    assert "this text was profiled before; --restart does it again" in err
    assert counted == []
    code, _, err = run(*arguments, "--restart")
    assert code == 0
    assert not any("profiled before" in line for line in err)
    assert len(counted) == 21
    assert (store / "profile" / "profile.json").read_bytes() == before


def test_another_text_takes_the_place_of_the_first_and_of_nothing_else(store, made, run):
    """The folder may be somebody's who has data of his own in it."""
    (store / "profile" / "data-mine").mkdir(parents=True)
    assert run(store, "--text", made / "text", *OPTIONS)[0] == 0
    assert run(store, "--text", made / "other", *OPTIONS)[0] == 0
    assert len(list((store / "profile").glob("data-*"))) == 2
    assert (store / "profile" / "data-mine").is_dir()
    assert not (store / "profile" / WORK).exists()


def test_several_texts_take_turns_and_gz_is_read(store, made, tmp_path, run):
    with gzip.open(tmp_path / "other.gz", "wb") as file:
        file.write((made / "other").read_bytes())
    outputs = []
    for other in (made / "other", tmp_path / "other.gz"):
        code, out, err = run(
            *(store, "--text", made / "text", "--text", other, *OPTIONS, "--tokens", 0, "--json"),
            *("-o", tmp_path / other.name.replace(".", "-out")),
        )
        assert code == 0, err
        outputs.append(json.loads(out))
    assert outputs[0]["num_tokens"] == outputs[1]["num_tokens"] > 640
    assert outputs[0]["zero_share_by_layer"] == outputs[1]["zero_share_by_layer"]


def test_merge_adds_up(store, made, tmp_path, run):
    for name in ("text", "other"):
        assert run(store, "--text", made / name, *OPTIONS, "-o", tmp_path / name)[0] == 0
    code, out, err = run(store, "--merge", tmp_path / "text", "--merge", tmp_path / "other", "--json")
    assert code == 0, err
    values = json.loads(out)
    assert values["num_tokens"] == 640
    assert len(values["texts"]) == 2
    assert values["folder"] == str(store / "profile")


def test_merging_drops_no_sample_in_silence(store, made, tmp_path, run):
    for name, samples in (("text", "1M"), ("other", "0")):
        options = ("--text", made / name, *OPTIONS, "--samples", samples, "-o", tmp_path / name)
        assert run(store, *options)[0] == 0
    merge = (store, "--merge", tmp_path / "text", "--merge", tmp_path / "other")
    code, _, err = run(*merge)
    assert code == 2
    assert (
        f"--merge {tmp_path / 'other'}: has no sample of its tokens, so the merged profile could have none" in err[-1]
    )
    assert not (store / "profile" / "profile.json").exists()
    code, _, err = run(*merge, "--samples", "0")
    assert code == 0, err
    assert json.loads((store / "profile" / "profile.json").read_text())["num_samples"] == 0


def test_text_that_ends_early_is_told(store, made, run):
    code, _, err = run(store, "--text", made / "text", *OPTIONS, "--tokens", "1000000")
    assert code == 0, err
    (line,) = [line for line in err if line.startswith("the text ended after ")]
    assert line.endswith(" of 1000000 tokens")


@pytest.mark.parametrize("option", ["--tokens", "--window", "--restart", "--ram", "--threads"])
def test_options_that_merging_does_nothing_with_are_refused(store, tmp_path, run, option):
    value = () if option == "--restart" else ("100",)
    code, _, err = run(store, "--merge", tmp_path / "a", "--merge", tmp_path / "b", option, *value)
    assert code == 2
    assert f"{option} does nothing with --merge, which reads no text; leave it out" in err[-1]


@pytest.mark.parametrize("option", ["--window", "--samples", "--ram", "--threads"])
def test_options_that_importing_counts_does_nothing_with_are_refused(store, tmp_path, option, refused):
    line = refused(store, "--powerinfer", tmp_path, option, "100")
    assert f"{option} does nothing with --powerinfer, which reads no text; leave it out" in line


def test_merge_says_how_much_of_the_samples_is_left(store, made, tmp_path, run):
    """A part with few sampled tokens bounds the others: a uniform sample has no more of their texts."""
    for name, samples in (("text", "1M"), ("other", "2000"), ("none", "0"), ("nothing", "0")):
        text = tmp_path / f"{name}.txt"
        text.write_text(f"{name} " + (made / "text").read_text())
        assert run(store, "--text", text, *OPTIONS, "--samples", samples, "-o", tmp_path / name)[0] == 0
    headers = [json.loads((tmp_path / name / "profile.json").read_text()) for name in ("text", "other")]
    given = sum(header["num_samples"] for header in headers)
    code, _, err = run(store, "--merge", tmp_path / "text", "--merge", tmp_path / "other")
    assert code == 0, err
    kept = json.loads((store / "profile" / "profile.json").read_text())["num_samples"]
    assert 0 < kept < given
    assert f"{kept} of {given} sampled tokens make a uniform sample of all texts" in err
    code, _, err = run(store, "--merge", tmp_path / "none", "--merge", tmp_path / "nothing")
    assert code == 0, err
    assert "none of these profiles has a sample to train predictors on, so the merged one has none either" in err


@pytest.mark.parametrize("is_converted", [True, False], ids=["store", "checkpoint"])
def test_one_refusal_names_memory_that_suffices(made, tmp_path, run, refused, is_converted, monkeypatch):
    """The profile's own share is counted with the model's, before anything is converted."""
    monkeypatch.setattr(run_module, "profiling_bytes", lambda *_: 300 << 20)
    model = made / ("store" if is_converted else "checkpoint")
    where = ("--cache-dir", tmp_path / "cache", "-o", tmp_path / "profile", "--text", made / "text", *OPTIONS)
    line = refused(model, *where, "--ram", "100M")
    (least,) = re.findall(r"give at least --ram (\d+)M, a smaller --window or --samples, or a smaller --quant", line)
    assert int(least) > 300
    assert not (tmp_path / "cache").exists()
    code, _, err = run(model, *where, "--ram", f"{least}M")
    assert code == 0, err


def test_a_checkpoint_is_converted_as_asked(made, tmp_path, run):
    options = ("--cache-dir", tmp_path / "cache", "--quant", "q8", "--group", "32", "--ffn-activation", "relu_glu")
    code, out, err = run(made / "checkpoint", "--text", made / "text", *OPTIONS, *options)
    assert code == 0, err
    store = open_store(Path(out.strip()).parent)
    assert str(store.manifest.quantization.weights) == "q8 group 32"
    assert store.manifest.config.activation.kind == "relu_glu"


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def test_short_steps_are_not_shown_and_long_ones_wholly():
    heard, clock = Heard(), Clock()
    steps = LongSteps(heard, clock)
    steps.start("short", 10)
    clock.now_s = 1.0
    steps.advance(10)
    steps.done()
    assert heard.steps == []
    steps.start("long", 7, "layers")
    clock.now_s = 1.9
    steps.advance(1)
    clock.now_s = 2.5
    steps.advance(2)
    assert heard.running
    steps.advance(4)
    steps.done()
    assert heard.steps == [["long", 7, "layers", 7]]
    assert not heard.running
    heard.start("windows", 3)
    steps.start("after them", 1)
    assert not heard.running  # what is shown ends where the next step begins


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --text FILE to read text, --merge DIR to add up profiles"),
        (("--text", "{text}", "--merge", "{store}"), "one of them only"),
        (("--text", "{store}/none"), "--text {store}/none: no such file"),
        (("--text", "{store}"), "--text {store}: is a folder; name its files, each with --text"),
        (
            ("--text", "{text}", "--text", "{store}/../made-link/text"),
            "a file is named twice, which would count it twice",
        ),
        (("--text", "{text}", "--tokens", "15"), "--tokens 15: is less than one window of 16 (see --window)"),
        (("--text", "{text}", "--tokens", "-1"), "'--tokens': -1 is not in the range x>=0"),
        (("--text", "{text}", "--tokens", "many"), "'--tokens': 'many' is not a valid integer"),
        (("--text", "{text}", "--window", "1"), "'--window': 1 is not in the range 2<=x<=65536"),
        (("--text", "{text}", "--samples", "lots"), "--samples: "),
        (("--text", "{text}", "--output", "{text}"), "'{text}' is a file"),
        (("--text", "{text}", "--threads", "0"), "'--threads' / '-t': 0 is not in the range"),
        (("--text", "{text}", "--threads", "999"), "'--threads' / '-t': 999 is not in the range 1<=x<=256"),
        (("--text", "{short}"), "{short}: has fewer than 16 tokens; give more text, or a smaller --window"),
        (("--text", "{empty}"), "{empty}: has fewer than 16 tokens"),
        (("--text", "{bytes}"), "--text {bytes}: is not UTF-8 text"),
        (("--text", "{broken}"), "--text {broken}: is not a whole gzip file"),
        (("--powerinfer", "{store}", "--samples", "1M"), "--samples does nothing with --powerinfer"),
        (("--merge", "{store}"), "--merge: name at least two folders, each once"),
        (("--merge", "{text}", "--merge", "{short}"), "{text}: has no profile.json; run hybrid-profile again"),
        (("--merge", "{store}", "--merge", "{store}/none"), "{store}: has no profile.json; run hybrid-profile again"),
        (("--text", "{text}", "--ram", "1k"), "--ram"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, message, store, made, tmp_path, refused):
    (tmp_path / "made-link").symlink_to(made)
    names = {"text": made / "text", "store": store}
    for name, data in {
        "short": b"Hello",
        "empty": b"",
        "bytes": TEXT.encode() * 20 + b"\xff",
        "broken": b"\x1f\x8b",
    }.items():
        names[name] = tmp_path / (f"{name}.gz" if name == "broken" else name)
        names[name].write_bytes(data)
    given = [each.format(**names) for each in arguments]
    reads = "--text" in given or not given
    assert message.format(**names) in refused(store, *(OPTIONS if reads else ()), *given)
    assert not (store / "profile" / "profile.json").exists()


def test_model_that_is_not_there_is_refused_by_name(made, tmp_path, refused):
    assert str(tmp_path / "none") in refused(tmp_path / "none", "--text", made / "text", "--offline")


def interrupt_after(monkeypatch, num_windows):
    """Ctrl-C while a window is computed."""
    after, done = run_module._Run._after, []

    def interrupted(*arguments):
        done.append(arguments)
        if len(done) > num_windows:
            raise KeyboardInterrupt
        return after(*arguments)

    monkeypatch.setattr(run_module._Run, "_after", interrupted)


def test_interrupted_run_keeps_what_is_done_and_takes_no_other_settings(
    store, made, run, refused, monkeypatch, tmp_path
):
    arguments = (store, "--text", made / "text", *OPTIONS)
    interrupt_after(monkeypatch, 7)
    code, out, err = run(*arguments)
    assert code == 130
    assert out == ""
    assert "what was counted is kept; the same command goes on from there" in err
    monkeypatch.undo()
    for other in (
        ("--text", made / "other", *OPTIONS),
        ("--text", made / "text", *OPTIONS, "--window", "32"),
        ("--text", made / "text", *OPTIONS, "--samples", "3000"),
        ("--text", made / "text", *OPTIONS, "--tokens", "64"),
        ("--text", made / "text", *OPTIONS, "--tokens", "640"),
    ):
        line = refused(store, *other)
        assert f"{store / 'profile' / WORK}: holds an unfinished profile of another text" in line
        assert "give --restart to begin anew, or finish that one with its own options" in line
    counted = []
    after = run_module._Run._after
    monkeypatch.setattr(run_module._Run, "_after", lambda *each: counted.append(each) or after(*each))
    assert run(*arguments)[0] == 0
    assert len(counted) == 21 - 7
    monkeypatch.undo()
    assert run(*arguments, "-o", tmp_path / "whole")[0] == 0
    for path in (tmp_path / "whole").rglob("*.*"):
        if path.is_file() and path.name != ".lock":
            assert path.read_bytes() == (store / "profile" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_unfinished_run_is_forgotten_with_restart(store, made, run, monkeypatch):
    interrupt_after(monkeypatch, 7)
    assert run(store, "--text", made / "text", *OPTIONS)[0] == 130
    monkeypatch.undo()
    code, _, err = run(store, "--text", made / "other", *OPTIONS, "--restart")
    assert code == 0, err
    assert not (store / "profile" / WORK).exists()


def test_interrupted_while_the_result_is_written_keeps_what_is_done(store, made, run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    arguments = (store, "--text", made / "text", *OPTIONS)
    monkeypatch.setattr(run_module, "write_counts", interrupt)
    assert run(*arguments)[0] == 130
    monkeypatch.undo()
    monkeypatch.setattr(run_module._Run, "_after", interrupt)  # nothing is left to be counted
    assert run(*arguments)[0] == 0


@pytest.mark.parametrize("damage", ["truncated", "not-json", "other-fields", "no-samples"])
def test_damaged_work_is_refused_by_name_and_restart_mends_it(damage, store, made, run, refused, monkeypatch):
    arguments = (store, "--text", made / "text", *OPTIONS)
    interrupt_after(monkeypatch, 7)
    assert run(*arguments)[0] == 130
    monkeypatch.undo()
    work = store / "profile" / WORK
    state = work / "state.safetensors"
    if damage == "truncated":
        state.write_bytes(state.read_bytes()[:1000])
    elif damage == "no-samples":
        (work / "samples.raw").unlink()
    else:
        save_file(load_file(state), state, {"run": "{" if damage == "not-json" else '{"windows": 7}'})
    line = refused(*arguments)
    assert str(work) in line
    assert "give --restart to begin anew" in line
    assert run(*arguments, "--restart")[0] == 0


def test_model_that_computes_nan_is_refused(store, made, refused, monkeypatch):
    from hybrid_runtime.model.decoder import Decoder  # noqa: PLC0415

    monkeypatch.setattr(Decoder, "_embed", lambda self, tokens, _: torch.full((len(tokens), 32), torch.nan))
    line = refused(store, "--text", made / "text", *OPTIONS)
    assert "computed NaN or Inf" in line


def test_smaller_profile_takes_no_larger_ones_place_unless_told_to(made, store, run, refused):
    assert run(store, "--text", made / "text", *OPTIONS)[0] == 0
    before = {path: path.read_bytes() for path in (store / "profile").rglob("*.*") if path.is_file()}
    smaller = (store, "--text", made / "other", *OPTIONS[:3], "160", *OPTIONS[4:])
    line = refused(*smaller)
    assert "has a profile of 320 tokens, which one of at most 160 would replace" in line
    assert "--restart" in line
    assert {path: path.read_bytes() for path in (store / "profile").rglob("*.*") if path.is_file()} == before
    (made / "short").write_text(TEXT)  # as few tokens as its bytes allow, whatever --tokens says
    assert "would replace" in refused(store, "--text", made / "short", *OPTIONS)
    assert run(*smaller, "--restart")[0] == 0
    assert read_profile(store / "profile", open_store(store).manifest.config).num_tokens == 160
    assert run(store, "--text", made / "text", *OPTIONS)[0] == 0, "a larger one replaces it"


def test_profile_of_the_text_that_the_package_carries_makes_way(made, store, run):
    assert run(store, "--text", SHIPPED_TEXT, *OPTIONS)[0] == 0
    assert run(store, "--text", made / "other", *OPTIONS[:3], "160", *OPTIONS[4:])[0] == 0
