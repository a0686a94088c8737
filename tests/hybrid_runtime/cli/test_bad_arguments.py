"""Names of models, flags and prompts that cannot be honoured: each is one line that says what to do."""

import pytest

from hybrid_runtime.cli.run import main
from hybrid_runtime.progress import NoProgress
from hybrid_runtime.stores import ModelRequest, convert_model

from ..model.conftest import one_thread  # noqa: F401, TID252  # a fixture


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/shadow-nothing/model",
        "/dev/null",
        "/etc/passwd",
        "a\0b",
        "x" * 300,
        "org/" + "x" * 300,
        "org/../name",
        "~nobody-of-this-name/model",
        "turbosparse-mixtrall",
        "org/name:../../x.gguf",
        "",
        " ",
        "a\nb",
        "\udcff",
    ],
    ids=lambda name: ascii(name[:24]),
)
def test_model_name(refused, name):
    refused("--model", name, "--prompt", "Hello")


def test_model_name_that_is_a_link_to_itself(refused, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused("--model", str(tmp_path / "loop"), "--prompt", "Hello")


def test_model_name_that_is_a_link_to_nothing(refused, tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    refused("--model", str(tmp_path / "dangling"), "--prompt", "Hello")


def test_folder_that_is_a_link_runs(sound, tmp_path, capsys):
    (tmp_path / "link").symlink_to(sound)
    arguments = [
        "--model",
        str(tmp_path / "link"),
        "--cache-dir",
        str(tmp_path / "cache"),
        "--prompt",
        "Hello",
        "-n",
        "2",
    ]
    assert main(arguments) == 0


FLAGS = {
    "temperature-nan": ("--temperature", "nan"),
    "temperature-negative": ("--temperature", "-1"),
    "temperature-inf": ("--temperature", "inf"),
    "temperature-word": ("--temperature", "warm"),
    "top-k-negative": ("--top-k", "-1"),
    "top-p-zero": ("--top-p", "0"),
    "top-p-above-one": ("--top-p", "1e308"),
    "min-p-nan": ("--min-p", "nan"),
    "repetition-penalty-zero": ("--repetition-penalty", "0"),
    "seed-negative": ("--seed", "-1"),
    "seed-huge": ("--seed", str(1 << 63)),
    "seed-of-5000-digits": ("--seed", "9" * 5000),
    "max-tokens-zero": ("--max-tokens", "0"),
    "max-tokens-negative": ("--max-tokens", "-1"),
    "max-tokens-float": ("--max-tokens", "1e308"),
    "ctx-zero": ("--ctx", "0"),
    "ctx-negative": ("--ctx", "-1"),
    "ctx-nan": ("--ctx", "nan"),
    "ctx-that-no-machine-holds": ("--ctx", str(1 << 60)),
    "vram-banana": ("--vram", "banana"),
    "vram-negative": ("--vram", "-8G"),
    "vram-nan": ("--vram", "nan"),
    "vram-1e308": ("--vram", "1e308"),
    "vram-empty": ("--vram", ""),
    "ram-banana": ("--ram", "banana"),
    "ram-zero": ("--ram", "0"),
    "ram-too-small": ("--ram", "100M"),
    "threads-zero": ("--threads", "0"),
    "predictor-unknown": ("--predictor", "maybe"),
    "predictor-that-the-model-has-not": ("--predictor", "mask"),
    "gate-that-does-not-decide": ("--predictor", "gate"),
    "quant-unknown": ("--quant", "q3"),
    "group-odd": ("--quant", "q4", "--group", "7"),
    "group-odd-that-f32-would-not-use": ("--group", "7"),
    "activation-unknown": ("--ffn-activation", "softplus"),
    "activation-threshold": ("--ffn-activation", "fatrelu:nan"),
    "stop-empty": ("--stop", ""),
    "stop-too-many": ("--stop", "x") * 65,
    "revision-of-a-path": ("--revision", "main"),
    "option-unknown": ("--tempature", "1"),
    "argument-extra": ("hello",),
    "value-missing": ("--seed",),
}


@pytest.mark.parametrize("fault", FLAGS)
def test_bad_flag(refused, sound, fault):
    line = refused("--model", str(sound), "--prompt", "Hello", *FLAGS[fault])
    flag = FLAGS[fault][-2] if len(FLAGS[fault]) > 1 else FLAGS[fault][0]
    assert flag.lstrip("-").replace("-", "_") in line.replace("-", "_")  # it says which flag it is about


@pytest.mark.parametrize(
    "flag", ["--temperature", "--top-p", "--min-p", "--top-k", "--max-tokens", "--repetition-penalty", "--seed"]
)
def test_sampling_flag_is_named_as_it_is_typed(refused, sound, flag):
    assert flag in refused("--model", str(sound), "--prompt", "Hello", flag, "-3")


PROMPTS = {
    "beyond-the-context": ("x" * 600, "--ctx"),
    "of-a-million-tokens": ("x " * 500_000, "--ctx"),
    "lone-surrogates": ("a\udcff\ud800", "UTF-8"),
}


@pytest.mark.parametrize("fault", PROMPTS)
@pytest.mark.parametrize("source", ["flag", "stdin"])
def test_bad_prompt(refused, sound, tmp_path, fault, source):
    text, named = PROMPTS[fault]
    store = tmp_path / "store"
    convert_model(ModelRequest(str(sound)), store, tmp_path, NoProgress())  # else the cache would hold what it may hold
    given = ("--prompt", text) if source == "flag" else ()
    assert named in refused("--model", str(store), *given, stdin="" if given else text)


def test_stdin_without_end(refused, sound):
    assert "stdin holds more than" in refused("--model", str(sound), stdin="y\n" * (1 << 24) + "y\n")
