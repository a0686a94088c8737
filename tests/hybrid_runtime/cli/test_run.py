"""hybrid-run in this process: what goes to stdout, what to stderr, and what each flag does."""

import io
import json
import re
import socket

import filelock
import pytest

from hybrid_runtime.cli.run import main
from hybrid_runtime.demo import make_demo

from ..model.conftest import one_thread  # noqa: F401, TID252  # a fixture
from ..small_models import TEMPLATE, TURBOSPARSE, write_model  # noqa: TID252  # absolute names are the runtime's


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "llama")
    write_model(folder / "chat", template=TEMPLATE)
    write_model(folder / "turbosparse", TURBOSPARSE, num_shards=3)
    return folder


@pytest.fixture
def run(models, capsys, monkeypatch):
    """Run the command; returns exit code, stdout and the lines of stderr. stdin None: empty."""

    def run(*arguments, model="llama", stdin=None):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin or ""))
        named = [] if model is None else ["--model", str(models / model)]
        code = main([*named, "--cache-dir", str(models / "cache"), "--threads", "1", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


GREEDY = ("--temperature", "0", "--max-tokens", "12", "--prompt", "Hello world")


def test_text_goes_to_stdout_and_the_summary_to_stderr(run):
    code, out, err = run(*GREEDY)
    assert code == 0
    assert out.endswith("\n")
    assert len(out) > 1
    blank, model, prefill, decode, memory = err[-5:]
    assert blank == ""
    assert model == "model    llama (llama), f32"
    assert re.fullmatch(r"prefill  3 tokens, [\d.]+ tokens/s, first token after \d+\.\d\d s", prefill)
    assert re.fullmatch(r"decode   12 tokens, [\d.]+ tokens/s, ended by --max-tokens", decode)
    assert re.fullmatch(r"memory   peak [\d.]+ [MG]iB, planned [\d.]+ [MG]iB", memory)


def test_json_is_one_object_and_nothing_else(run):
    _, text, _ = run(*GREEDY)
    code, out, err = run(*GREEDY, "--json")
    assert code == 0
    answer = json.loads(out)
    assert answer["text"] + "\n" == text
    assert answer["model"] == "llama"
    assert answer["quantization"] == "f32"
    assert (answer["prompt_tokens"], answer["generated_tokens"], answer["finish_reason"]) == (3, 12, "length")
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "time_to_first_token_s", "peak_rss_bytes"):
        assert answer[name] > 0
    assert err[-1].startswith("memory")


def test_interrupt_between_two_pieces_keeps_what_was_said(run, monkeypatch):
    class Interrupting(io.StringIO):
        def flush(self):
            if len(self.getvalue()) == 3:
                raise KeyboardInterrupt

    stdout = Interrupting()
    _, expected, _ = run(*GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stdout)
        code, _, err = run(*GREEDY)
    assert (code, stdout.getvalue()) == (130, expected[:3] + "\n")
    assert any("ended by Ctrl-C" in line for line in err)


def test_reported_seed_repeats_the_text(run):
    flags = ("--temperature", "1", "--max-tokens", "16", "--prompt", "Hello", "--json")
    first, second = (json.loads(run(*flags)[1]) for _ in range(2))
    assert first["seed"] != second["seed"]
    assert first["text"] != second["text"]
    assert json.loads(run(*flags, "--seed", str(first["seed"]))[1])["text"] == first["text"]


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_prompt_on_stdin_is_the_prompt_without_its_last_newline(run, ending):
    _, expected, _ = run(*GREEDY)
    assert run(*GREEDY[:-2], stdin="Hello world" + ending)[:2] == (0, expected)


def test_empty_stdin_begins_from_nothing_and_says_so(run):
    _, expected, _ = run(*GREEDY[:-2], "--prompt", "")
    code, out, err = run(*GREEDY[:-2], stdin="")
    assert (code, out) == (0, expected)
    assert any("stdin is empty" in line for line in err)


def test_vram_is_honoured_as_zero_and_said_once(run):
    _, expected, quiet = run(*GREEDY)
    code, out, err = run(*GREEDY, "--vram", "8G")
    assert (code, out) == (0, expected)
    assert sum("--vram" in line for line in err) == 1
    assert any(line.startswith("--vram 8.00 GiB is honoured as 0: ") for line in err)
    assert not any("--vram" in line for line in quiet)


def test_verbose_says_what_was_chosen_and_why(run):
    _, _, err = run(*GREEDY, "--verbose", "--ctx", "77")
    labels = {line.split()[0]: line for line in err if line}
    assert {"machine", "backend", "store", "weights", "family", "predictor", "context", "memory"} <= labels.keys()
    assert "context    77 tokens, keys and values in torch.float32" in err
    assert any("GPU" in line for line in err)
    assert any("compiled kernels" in line and "KV cache" in line for line in err)


def test_mapped_weights_give_the_same_text(run):
    read, mapped = (run(*GREEDY, "--load", load, "--verbose") for load in ("anonymous", "mmap"))
    assert read[:2] == mapped[:2]
    assert any(line.startswith("weights    in anonymous memory, ") for line in read[2])
    assert any(line.startswith("weights    mapped from their files, ") for line in mapped[2])


@pytest.mark.parametrize("mode", ["mask", "off", "gate"])
def test_predictor_mode_is_the_one_asked_for(run, mode):
    code, _, err = run(*GREEDY, "--predictor", mode, "--verbose", model="turbosparse")
    assert code == 0
    assert f"predictor  {mode}" in err


def test_predictor_of_turbosparse_masks_by_default_and_it_matters(run):
    flags = ("--temperature", "0", "--max-tokens", "40", "--prompt", "Hello world")
    texts = {mode: run(*flags, "--predictor", mode, model="turbosparse")[1] for mode in ("mask", "off", "gate")}
    assert run(*flags, model="turbosparse")[1] == texts["mask"]
    assert texts["off"] == texts["gate"]  # a closed gate is an exact zero
    assert texts["mask"] != texts["off"]


def test_stop_ends_before_the_text(run):
    _, text, _ = run(*GREEDY)
    stop = text[3:5]
    _, out, err = run(*GREEDY, "--stop", stop, "--stop", "never")
    assert out == text[: text.index(stop)] + "\n"
    assert any("ended by a stop string" in line for line in err)


def test_chat_template_is_used_unless_raw(run):
    flags = ("--temperature", "0", "--max-tokens", "8", "--json", "--prompt", "Hello world")
    chat = json.loads(run(*flags, model="chat")[1])
    with_system = json.loads(run(*flags, "--system", "Be brief.", model="chat")[1])
    raw = json.loads(run(*flags, "--raw", model="chat")[1])
    assert raw["prompt_tokens"] == 3 < chat["prompt_tokens"] < with_system["prompt_tokens"]


def test_second_run_converts_nothing(models, run):
    write_model(models / "new", seed=5)
    _, first, said = run(*GREEDY, model="new")
    _, second, said_then = run(*GREEDY, model="new")
    assert sum(line.startswith("converting") for line in said) >= 1
    assert not any(line.startswith("converting") for line in said_then)
    assert first == second


def test_complete_store_is_read_while_another_program_holds_its_lock(models, run):
    write_model(models / "locked", seed=6)
    _, expected, _ = run(*GREEDY, model="locked")
    (store,) = (models / "cache" / "stores").glob("locked-*")
    with filelock.FileLock(store / ".lock"):
        assert run(*GREEDY, model="locked")[:2] == (0, expected)


def test_context_beyond_the_trained_one_is_allowed_and_said(run):
    code, _, err = run(*GREEDY, "--ctx", "4000")
    assert code == 0
    assert "--ctx 4000: the model was made for 128 tokens" in err


def test_without_a_model_the_shipped_one_writes_and_needs_no_network(run, monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    flags = ("--prompt", "Once upon a time", "--max-tokens", "10", "--seed", "3")
    code, out, err = run(*flags, model=None)
    assert code == 0
    assert len(out) > 1
    assert err[0].startswith("no --model given: running tinystories-moe, a small model that writes stories")
    assert run(*flags, model=None)[:2] == (0, out)
    assert "model    tinystories-moe (turbosparsemixtral), q8 group 32" in err


@pytest.mark.parametrize("quant", ["f32", "q4"])
def test_shipped_model_is_packed_again_where_another_format_is_asked_for(run, quant):
    flags = ("--quant", quant, "--prompt", "Once upon a time", "--max-tokens", "10", "--temperature", "0")
    code, out, err = run(*flags, model=None)
    assert code == 0
    assert any(line.startswith(f"converting tinystories-moe to {quant}") for line in err)
    code, again, err = run(*flags, model=None)
    assert (code, again) == (0, out)
    assert not any(line.startswith("converting") for line in err)


def test_random_demo_still_runs_under_its_name(run, models, monkeypatch):
    monkeypatch.chdir(models)
    code = main(["--model", "random-demo", "--cache-dir", str(models / "cache"), "--threads", "1", *GREEDY])
    assert code == 0


def test_demo_is_the_same_on_every_machine(tmp_path):
    first, second = make_demo(tmp_path / "a"), make_demo(tmp_path / "b")
    names = sorted(path.name for path in first.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]  # and no temporary folder


def test_ram_that_does_not_do_is_refused_before_anything_is_written(models, run, tmp_path):
    cache = tmp_path / "cache"
    code, out, err = run(*GREEDY, "--ram", "64M", "--cache-dir", str(cache))
    assert (code, out, len(err)) == (2, "", 1)
    assert re.match(r"hybrid-run: --ram 64\.00 MiB: the model needs [\d.]+ [MG]iB \(.*weights.*KV cache", err[0])
    assert not cache.exists()
    enough = re.search(r"give at least --ram (\d+M)", err[0])[1]
    assert run(*GREEDY, "--ram", enough, "--cache-dir", str(cache))[0] == 0


def test_revision_of_something_local_is_refused(run):
    code, _, err = run(*GREEDY, "--revision", "v1")
    assert code == 2
    assert len(err) == 1
    assert "--revision v1" in err[0]
