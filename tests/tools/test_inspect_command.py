"""hybrid-inspect: what it shows of a model and of published statistics, and what it says when something is missing."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from hybrid_runtime.profiling.profile import Profile, TextDigest, empty_layers
from hybrid_runtime.profiling.profile_file import PROFILE_FOLDER
from hybrid_runtime.store.beside import store_digest
from hybrid_runtime.store.predictor_files import (
    FORMAT_NAME,
    FORMAT_VERSION,
    PREDICTOR_FOLDER,
    LayerPredictors,
    PredictorHeader,
    write_header,
)
from hybrid_runtime.store.reader import open_store
from hybrid_tools.convert import main as convert
from hybrid_tools.foreign_statistics import save_imported
from hybrid_tools.inspect import main
from hybrid_tools.profile import main as profile
from tests.hybrid_runtime.small_models import LLAMA, TURBOSPARSE, write_model

DENSE = LLAMA | {"architectures": ["BambooForCausalLM"], "model_type": "bamboo", "hidden_act": "relu"}


def make_profile(store, folder):
    """Counts that no model made, of the store's shape."""
    config = store.manifest.config
    generator = torch.Generator().manual_seed(0)
    layers = empty_layers(config, 4)
    for layer in layers:
        layer.tokens.fill_(900)
        layer.fired.random_(0, 400, generator=generator)
        layer.co_fired.random_(0, 100, generator=generator)
        layer.active_squares.fill_(900 * (layer.fired.shape[1] // 3) ** 2)
        layer.follows.random_(1, 300, generator=generator)
    num_tokens = int(layers[0].tokens.sum()) // max(1, config.num_experts_per_tok)
    texts = (TextDigest("0" * 64, num_tokens),)
    watched, held_out = torch.arange(4), torch.zeros(0, 64, dtype=torch.int32)
    made = Profile(store.manifest.model, store_digest(store), texts, 64, watched, layers, held_out)
    return save_imported(made, config, folder)


def make_predictors(store, folder):
    layers = tuple(
        LayerPredictors(8, 0.25, 4096, recall, 0.5, 0.1, 0.05) for recall in (0.9375, None)
    )  # nobody measured layer 1
    header = PredictorHeader(
        FORMAT_NAME, FORMAT_VERSION, store.manifest.model, store_digest(store), "hybrid-predictors train",
        "pre_norm", True, "q8", 32, layers, 5.0, 4.9, f"data-{'0' * 16}",
    )  # fmt: skip
    folder.mkdir()
    write_header(folder, header)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A mixture with a profile and predictors, a dense model with neither, and checkpoints of both."""
    folder = tmp_path_factory.mktemp("stores")
    for name, config in (("mixture", TURBOSPARSE), ("dense", DENSE)):
        write_model(folder / f"{name}-checkpoint", config)
        assert convert([str(folder / f"{name}-checkpoint"), "-o", str(folder / name)]) == 0
    mixture = open_store(folder / "mixture")
    make_profile(mixture, folder / "mixture" / PROFILE_FOLDER)
    make_predictors(mixture, folder / "mixture" / PREDICTOR_FOLDER)
    return folder


@pytest.fixture
def run(tmp_path, capsys):
    def run(*arguments):
        capsys.readouterr()
        code = main([*(str(argument) for argument in arguments), "--cache-dir", str(tmp_path / "cache")])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def published(tmp_path):
    """Files as Fiddler and TEAL have them."""
    order = [[layer, expert] for expert in (1, 0, 2) for layer in (1, 0)]
    (tmp_path / "order.json").write_text(json.dumps({"note": "a <b>note</b>", "order": order}))
    tensors = ("self_attn.h1", "self_attn.h2", "mlp.h1", "mlp.h1.5", "mlp.h2")
    arrays = {}
    for name in (f"layer_{layer:02d}.{tensor}" for layer in (0, 1) for tensor in tensors):
        arrays |= {name: np.ones(50, dtype=np.int32), f"{name}_centers": np.linspace(-1, 2, 50, dtype=np.float32)}
    np.savez(tmp_path / "histograms.npz", **arrays)
    return "--expert-popularity", tmp_path / "order.json", "--histograms", tmp_path / "histograms.npz"


class Links(HTMLParser):
    """Collects what a page would fetch or run, and its open tags."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        self.links += [name for name, _ in attrs if name.startswith("on")]


def test_a_page_and_pictures_say_all_that_is_known(stores, run, published, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (the extra plots)")
    page, png = tmp_path / "report.html", tmp_path / "png"
    code, out, err = run(stores / "mixture", "-o", page, "--png", png, *published)
    assert code == 0, err
    assert out.strip() == str(page)
    assert "drawing mixture-checkpoint" in err
    drawn = {path.stem for path in png.iterdir()}
    assert drawn == {
        "zeros", "shares", "dead", "experts", "transitions", "spread", "correlation", "predictors", "popularity",
        "histograms",
    }  # fmt: skip
    text = page.read_text()
    parsed = Links()
    parsed.feed(text)
    assert parsed.tags.count("svg") == len(drawn)
    assert not {"script", "iframe", "object", "link", "img"} & set(parsed.tags)
    assert all(link.startswith(("#", "data:image/png")) for link in parsed.links)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "prefers-color-scheme" in text
    assert "93.75" in text or "93.8" in text  # the recall that was measured
    assert "hybrid-predictors train" in text


def test_the_json_has_the_same_numbers_and_stands_alone(stores, run, published):
    code, out, err = run(stores / "mixture", "--json", *published)
    assert code == 0, err
    values = json.loads(out)
    assert values["profile"]["model"] == "mixture-checkpoint"
    assert len(values["profile"]["layers"]) == 2
    assert [layer["recall"] for layer in values["predictors"]] == [0.9375, None]
    assert values["popularity"]["order"] == [[1, 0, 2], [1, 0, 2]]
    assert {tensor["num_values"] for tensor in values["histograms"]} == {50}
    assert values["placement"] == []


def test_without_an_output_the_layers_are_printed(stores, run):
    code, out, err = run(stores / "mixture")
    assert code == 0, err
    lines = out.splitlines()
    assert re.fullmatch(r"mixture-checkpoint: \d+ tokens, \d+\.\d % of the values are zero", lines[0])
    assert [line.split()[0] for line in lines[2:]] == ["0", "1"]


def test_published_statistics_need_no_model(run, published, tmp_path):
    code, out, err = run(*published, "-o", tmp_path / "page.html")
    assert code == 0, err
    text = (tmp_path / "page.html").read_text()
    assert "<b>note</b>" not in text
    code, out, _ = run(*published)
    assert "0  1 0 2" in out
    assert "mlp.h2: 50 values a layer" in out


def test_nothing_is_converted_or_written_only_to_look(stores, run, tmp_path):
    before = sorted(stores.rglob("*"))
    code, out, err = run(stores / "dense-checkpoint", "-o", tmp_path / "page.html")
    assert (code, out) == (2, "")
    assert "is not converted to f32 yet" in err
    assert f"hybrid-profile {stores / 'dense-checkpoint'} --text FILE" in err
    assert run(stores / "mixture")[0] == 0
    assert sorted(stores.rglob("*")) == before
    assert not (tmp_path / "page.html").exists()
    assert not (tmp_path / "cache").exists()


def test_what_is_missing_is_named_with_what_makes_it(stores, run, tmp_path):
    code, _, err = run(stores / "dense")
    assert code == 2
    assert "has no profile of" in err
    assert f"make one: hybrid-profile {stores / 'dense'} --text FILE" in err
    shutil.copytree(stores / "mixture", tmp_path / "mixture")
    shutil.rmtree(tmp_path / "mixture" / PREDICTOR_FOLDER)
    code, _, err = run(tmp_path / "mixture")
    assert code == 0
    assert "hybrid-predictors train" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to show: name a MODEL"),
        (["--profile", "x"], "nothing to show: name a MODEL"),
        (["--profile", "x", "--histograms", "x"], "--profile x: name the MODEL that it is of"),
        (["--plan", "x", "--histograms", "x"], "--plan x: name the MODEL that it is of"),
        (["--quant", "q4", "--histograms", "x"], "--quant q4: name the MODEL that it is of"),
        (["--group", "64", "--histograms", "x"], "--group 64: name the MODEL that it is of"),
        (["--revision", "x", "--histograms", "x"], "--revision x: name the MODEL that it is of"),
        (["--ffn-activation", "x", "--histograms", "x"], "--ffn-activation x: name the MODEL that it is of"),
        (["--expert-popularity", "/absent.json"], "/absent.json: no such file"),
        (["--histograms", "/absent.npz"], "/absent.npz: no such file"),
        (["--histograms", __file__], "test_inspect_command.py: cannot be read as .npz"),
        (["--histograms", __file__, "-o", "/absent/page.html"], "there is no folder /absent"),
        (["absent/model"], "absent/model"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_bad_arguments_are_refused_by_name(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_another_models_profile_is_refused(stores, run):
    code, _, err = run(stores / "dense", "--profile", stores / "mixture" / PROFILE_FOLDER)
    assert code == 2
    assert "is of mixture-checkpoint" in err


def test_without_matplotlib_the_page_keeps_its_tables(stores, run, monkeypatch, tmp_path):
    monkeypatch.setattr("hybrid_tools.inspection.figures.has_matplotlib", lambda: False)
    code, _, err = run(stores / "mixture", "-o", tmp_path / "page.html")
    assert code == 0
    assert "pip install 'hybrid-runtime[plots]'" in err
    text = (tmp_path / "page.html").read_text()
    assert "<svg" not in text
    assert text.count("hybrid-runtime[plots]") == 1
    assert "<table" in text
    code, _, err = run(stores / "mixture", "--png", tmp_path / "png")
    assert code == 2
    assert "--png: pictures need matplotlib" in err
    assert not (tmp_path / "png").exists()


def test_interrupted_while_drawing_what_is_drawn_is_whole(stores, run, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (the extra plots)")
    from hybrid_tools.inspection import pictures  # noqa: PLC0415

    def interrupted(facts):
        raise KeyboardInterrupt

    monkeypatch.setattr(pictures, "draw_firing", lambda *facts: interrupted(facts))
    code, out, err = run(stores / "mixture", "-o", tmp_path / "page.html", "--png", tmp_path / "png")
    assert (code, out) == (130, "")
    assert f"the pictures that were drawn are in {tmp_path / 'png'}" in err
    assert [path.name for path in (tmp_path / "png").iterdir()] == ["zeros.png"]
    assert not (tmp_path / "page.html").exists()


def test_powerinfers_counts_become_a_profile_that_can_be_looked_at(stores, run, tmp_path, capsys):
    source = tmp_path / "activation"
    source.mkdir()
    generator = torch.Generator().manual_seed(0)
    for layer_idx in range(2):
        torch.save(torch.randint(0, 400, (48,), generator=generator), source / f"activation_{layer_idx}.pt")
    arguments = [str(stores / "dense"), "--powerinfer", str(source), "--output", str(tmp_path / "profile")]
    assert profile([*arguments, "--tokens", "500", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["num_tokens"] == 500
    assert values["zero_share"] == pytest.approx(0.6, abs=0.1)
    code, out, err = run(stores / "dense", "--profile", tmp_path / "profile", "--json")
    assert code == 0, err
    facts = json.loads(out)["profile"]
    assert facts["num_tokens"] == 500
    assert [layer["spread"] for layer in facts["layers"]] == [None, None]  # nobody counted pairs


@pytest.mark.parametrize("other", [["--text", "x"], ["--merge", "x"]], ids=["text", "merge"])
def test_importing_counts_excludes_counting(stores, other, capsys):
    assert profile([str(stores / "dense"), "--powerinfer", "x", *other]) == 2
    assert "one of them only" in capsys.readouterr().err


def test_help_says_what_each_option_is_for(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--output", "--png", "--profile", "--expert-popularity", "--histograms", "--json", "--cache-dir"):
        assert option in text
    assert "[default: the one with its store]" in " ".join(text.split())
    assert "Nothing is fetched, with or without --offline." in " ".join(text.split())
