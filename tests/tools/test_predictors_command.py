"""hybrid-predictors: from a profile to predictors that decoding uses, beside other kinds, and PowerInfer's."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from hybrid_runtime.config import ModelConfig
from hybrid_runtime.engine import open_model
from hybrid_runtime.load_options import LoadOptions
from hybrid_runtime.model.decoder import Decoder
from hybrid_runtime.model.kv_cache import KvCache
from hybrid_runtime.placement.sampled_ratios import sampled_ratios
from hybrid_runtime.store.manifest import read_manifest
from hybrid_runtime.store.predictor_files import PREDICTORS
from hybrid_runtime.store.reader import Store
from hybrid_runtime.stores import ModelRequest
from hybrid_tools.convert import main as convert
from hybrid_tools.predictors import main
from hybrid_tools.profile import main as profile
from tests.hybrid_runtime.small_models import LLAMA, TURBOSPARSE, write_model, write_pre_norm_model

DENSE = LLAMA | {"architectures": ["BambooForCausalLM"], "model_type": "bamboo", "hidden_act": "relu"}
TEXT = "Hello world, once upon a time there was a neuron and the others and a layer. " * 60


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A dense model and a mixture as stores with profiles."""
    folder = tmp_path_factory.mktemp("stores")
    (folder / "text").write_text(TEXT)
    for name, config in (("dense", DENSE), ("mixture", TURBOSPARSE)):
        write_model(folder / f"{name}-checkpoint", config)
        assert convert([str(folder / f"{name}-checkpoint"), "-o", str(folder / name)]) == 0
        options = ["--text", str(folder / "text"), "--window", "64", "--tokens", "2048", "--threads", "1"]
        assert profile([str(folder / name), *options]) == 0
    return folder


@pytest.fixture
def run(stores, capsys):
    def run(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


EASY = (
    "--rows",
    "q8",
    "--recall",
    "0.9",
    "--max-named",
    "100",
    "--max-share",
    "1",
    "--max-loss",
    "100",
    "--epochs",
    "2",
)


@pytest.mark.parametrize("name", ["dense", "mixture"])
def test_trained_predictors_are_what_decoding_computes_with(name, stores, run):
    code, out, err = run("train", stores / name, *EASY, "--threads", "1")
    assert code == 0, err
    assert out.splitlines()[-1].startswith("all: recall 0.")
    request = ModelRequest(str(stores / name))
    decoders = {}
    for mode in ("trained", "off"):
        opened = open_model(request, LoadOptions(num_positions=64, predictor=mode, threads=1))
        decoders[mode] = opened.load_sequence().decoder
    tokens = torch.arange(5, 45)
    config = decoders["off"].config
    cache = KvCache(config, 64, "f32")
    batch = decoders["trained"].forward(tokens, cache, all_logits=True)
    steps = KvCache(config, 64, "f32")
    alone = torch.cat([decoders["trained"].forward(token.view(1), steps) for token in tokens])
    # a logit at the threshold may fall to either side, so not all tokens need agree: most do
    assert ((batch - alone).norm(dim=1) <= 1e-3 * batch.norm(dim=1)).float().mean() > 0.7
    exact = decoders["off"].forward(tokens, KvCache(config, 64, "f32"), all_logits=True)
    assert not torch.equal(batch, exact)  # something is ruled out
    counters = decoders["trained"].counters
    assert counters.up_rows < len(tokens) * config.num_hidden_layers * max(1, config.num_experts_per_tok) * (
        config.intermediate_size
    )


def test_run_that_did_not_reach_what_was_asked_says_so(stores, run, tmp_path):
    shutil.copytree(stores / "dense", tmp_path / "dense", ignore=shutil.ignore_patterns("predictors"))
    code, out, err = run("train", tmp_path / "dense", *EASY[:-1], "1", "--max-named", "1", "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert any("neurons named for one that fires, wanted 1" in miss for miss in answer["misses"])
    assert 0 < answer["recall"] <= 1
    assert len(answer["ranks"]) == DENSE["num_hidden_layers"]


def test_killed_run_goes_on_with_the_layers_that_are_left(stores, run, monkeypatch, tmp_path):
    from hybrid_tools.predictor_training import run as module  # noqa: PLC0415

    shutil.copytree(stores / "dense", tmp_path / "dense")
    found, calls = module.train_layer, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return found(*arguments)

    monkeypatch.setattr(module, "train_layer", interrupted)
    arguments = ("train", tmp_path / "dense", *EASY, "--threads", "1")
    code, _, err = run(*arguments)
    assert code == 130
    assert "what was trained of whole layers is kept" in " ".join(err)
    code, out, _ = run(*arguments)
    assert code == 0
    assert len(calls) == 3  # the first layer is not trained again
    monkeypatch.setattr(module, "train_layer", found)
    shutil.rmtree(tmp_path / "dense" / "predictors")
    assert without_times(run(*arguments)[1]) == without_times(out)


def without_times(out):
    return re.sub(r"\d+ % of the feed-forward networks' time", "", out)


def test_kinds_stand_side_by_side(stores, run):
    assert run("train", stores / "dense", *EASY, "--threads", "1")[0] == 0
    code, out, _ = run("compare", stores / "dense", "--json", "--recall", "0.9", "--threads", "1")
    kinds = {row["kind"]: row for row in json.loads(out)["kinds"]}
    assert code == 0
    assert list(kinds) == ["mlp", "sign", "svd", "exact-gate", "oracle", "random"]
    assert kinds["oracle"]["recall"] == kinds["oracle"]["precision"] == kinds["exact-gate"]["recall"] == 1
    assert abs(kinds["oracle"]["loss"]) < 1e-4
    assert kinds["exact-gate"]["precision"] < 1
    for kind in ("sign", "svd"):
        assert kinds[kind]["recall"] > 0.8
    assert kinds["random"]["recall"] < 0.6


@pytest.fixture(scope="module")
def pre_norm(tmp_path_factory):
    """Its own predictors name half of the neurons."""
    folder = tmp_path_factory.mktemp("pre-norm")
    write_pre_norm_model(folder / "checkpoint")
    (folder / "text").write_text(TEXT)
    assert convert([str(folder / "checkpoint"), "-o", str(folder / "store")]) == 0
    options = ["--text", str(folder / "text"), "--window", "64", "--tokens", "2048", "--threads", "1"]
    assert profile([str(folder / "store"), *options]) == 0
    return folder / "store"


def test_gates_read_behind_the_norm_though_predictors_do_not(pre_norm, run):
    config = read_manifest(pre_norm).config
    assert config.predictor_input == "pre_norm"
    code, out, err = run("compare", pre_norm, "--json", "--recall", "0.9", "--threads", "1")
    assert code == 0, err
    kinds = {row["kind"]: row for row in json.loads(out)["kinds"]}
    assert kinds["oracle"]["recall"] == kinds["exact-gate"]["recall"] == 1
    assert kinds["oracle"]["precision"] > kinds["exact-gate"]["precision"]
    for kind in ("sign", "svd"):
        assert kinds[kind]["recall"] > 0.8
    gates = sampled_ratios(Store(pre_norm, read_manifest(pre_norm)), pre_norm / "profile").gates_for_one
    assert gates == pytest.approx(1 / kinds["exact-gate"]["precision"], rel=0.2)


def test_only_the_kinds_that_are_asked_for(stores, run):
    code, out, err = run("compare", stores / "dense", "--kind", "sign", "--kind", "random", "--threads", "1")
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["sign", "random"]
    assert [line for line in err if line.endswith(" ...")][-2:] == ["sign ...", "random ..."]
    shutil.rmtree(stores / "dense" / "predictors", ignore_errors=True)
    code, _, err = run("compare", stores / "dense", "--kind", "mlp", "--threads", "1")
    assert code == 2
    assert "--kind mlp: this model has sign, svd, exact-gate, oracle, random" in err[-1]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_old_predictors_are_there_until_new_ones_are(stores, run, monkeypatch, tmp_path):
    from hybrid_tools.predictor_training import run as module  # noqa: PLC0415

    shutil.copytree(stores / "dense", tmp_path / "dense", ignore=shutil.ignore_patterns("predictors"))
    folder = tmp_path / "dense" / "predictors"
    assert run("train", tmp_path / "dense", *EASY, "--threads", "1")[0] == 0
    before = {name: data for name, data in contents(folder).items() if name.name != module.LOCK}
    assert not (folder / module.WORK).exists()
    harder = ("train", tmp_path / "dense", *EASY[:-1], "1", "--threads", "1", "--max-named", "1")
    found, rounds = module.judged, []

    def interrupted(*arguments):
        rounds.append(arguments)
        if len(rounds) == 2:
            raise KeyboardInterrupt
        return found(*arguments)

    monkeypatch.setattr(module, "judged", interrupted)
    assert run(*harder, "--first-share", "0.05")[0] == 130
    assert len(rounds) == 2
    now = contents(folder)
    assert {name: now[name] for name in before} == before
    assert (folder / module.WORK).exists()
    assert run("compare", tmp_path / "dense", "--kind", "mlp", "--threads", "1")[0] == 0
    assert run(*harder, "--first-share", "0.05")[0] == 0
    assert contents(folder)[Path(PREDICTORS)] != before[Path(PREDICTORS)]
    assert not (folder / module.WORK).exists()


def test_worse_predictors_take_no_better_ones_place_unless_told_to(stores, run, tmp_path):
    shutil.copytree(stores / "dense", tmp_path / "dense", ignore=shutil.ignore_patterns("predictors"))
    path = tmp_path / "dense" / "predictors" / PREDICTORS
    assert run("train", tmp_path / "dense", *EASY, "--threads", "1")[0] == 0
    header = json.loads(path.read_bytes())
    for layer in header["layers"]:  # as if they named exactly what fires
        layer |= {"recall": 1.0, "precision": 1.0, "predicted_density": layer["true_density"]}
    path.write_text(json.dumps(header))
    harder = ("train", tmp_path / "dense", *EASY[:-1], "1", "--threads", "1", "--max-named", "1")
    code, _, err = run(*harder)
    assert code == 2
    assert "keeps the predictors that were there, which reach more of what is asked" in err[-1]
    assert json.loads(path.read_bytes()) == header
    assert run(*harder, "--replace")[0] == 0
    assert json.loads(path.read_bytes()) != header


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["before the data", "before the header"])
def test_training_the_same_again_leaves_the_old_until_the_very_end(stores, run, monkeypatch, tmp_path, moment):
    from hybrid_tools.predictor_training import run as module  # noqa: PLC0415

    shutil.copytree(stores / "dense", tmp_path / "dense", ignore=shutil.ignore_patterns("predictors"))
    folder, arguments = tmp_path / "dense" / "predictors", ("train", tmp_path / "dense", *EASY, "--threads", "1")
    assert run(*arguments)[0] == 0
    before = {name: data for name, data in contents(folder).items() if name.name != module.LOCK}
    rename = Path.rename

    def interrupted(path, target):
        return interrupt() if path.name == module.READY else rename(path, target)

    if moment == "before the data":
        monkeypatch.setattr(Path, "rename", interrupted)
    else:
        monkeypatch.setattr(module, "write_header", interrupt)
    assert run(*arguments)[0] == 130
    now = contents(folder)
    assert {name: now[name] for name in before} == before
    monkeypatch.undo()
    monkeypatch.setattr(module, "train_layer", interrupt)  # all layers are there already
    assert run(*arguments)[0] == 0
    assert len(list(folder.glob("data-*"))) == 1
    assert run("compare", tmp_path / "dense", "--kind", "mlp", "--threads", "1")[0] == 0


def test_layers_trained_on_another_sample_are_not_taken(stores, run, monkeypatch, tmp_path):
    from hybrid_tools.predictor_training import run as module  # noqa: PLC0415

    shutil.copytree(stores / "dense", tmp_path / "dense", ignore=shutil.ignore_patterns("predictors"))
    arguments = ("train", tmp_path / "dense", *EASY, "--threads", "1")
    found, trained = module.train_layer, []

    def watched(sample, *others):
        trained.append(len(sample))
        return found(sample, *others)

    monkeypatch.setattr(module, "train_layer", watched)
    monkeypatch.setattr(module, "judged", interrupt)
    assert run(*arguments)[0] == 130
    assert run(*arguments)[0] == 130
    assert len(trained) == 2  # one of each layer
    text = ["--text", str(stores / "text"), "--window", "64", "--tokens", "2048", "--samples", "50K"]
    assert profile([str(tmp_path / "dense"), *text, "--restart", "--threads", "1"]) == 0
    assert run(*arguments)[0] == 130
    assert len(trained) == 4
    assert trained[2] < trained[0]


def test_rounds_compute_what_the_model_loses_only_when_it_matters(stores, run, monkeypatch, tmp_path):
    from hybrid_tools.predictor_training import run as module  # noqa: PLC0415

    shutil.copytree(stores / "dense", tmp_path / "dense", ignore=shutil.ignore_patterns("predictors"))
    known, losses = [], []
    judged, window_losses = module.judged, module.window_losses
    monkeypatch.setattr(module, "judged", lambda *values: (known.append(values[3]), judged(*values))[1])
    monkeypatch.setattr(module, "window_losses", lambda *values: (losses.append(1), window_losses(*values))[1])
    arguments = ("train", tmp_path / "dense", *EASY[:-1], "1", "--threads", "1", "--max-named", "1")
    code, out, err = run(*arguments, "--first-share", "0.05", "--json")
    assert code == 0, err
    assert len(known) >= 2
    assert [each is None for each in known] == [True] + [False] * (len(known) - 1)
    assert len(losses) == 1
    answer = json.loads(out)
    assert answer["loss"] == pytest.approx(answer["perplexity"] / answer["exact_perplexity"] - 1)


@pytest.mark.parametrize("option", ["--ram", "--threads"])
def test_an_import_has_no_options_that_would_do_nothing(stores, run, tmp_path, option):
    code, _, err = run("import", stores / "dense", tmp_path, option, "4")
    assert code == 2
    assert f"No such option: {option}" in " ".join(err) or f"No such option '{option}'" in " ".join(err)


def test_too_little_memory_is_refused_in_words_of_this_program(stores, run):
    for arguments in (("train", *EASY), ("compare",)):
        code, out, err = run(arguments[0], stores / "dense", *arguments[1:], "--ram", "10M")
        assert (code, out) == (2, "")
        assert "a profile with a smaller --window or --samples" in err[-1]
        assert "--ctx" not in err[-1]


def test_memory_that_training_lacks_is_refused_before_it_begins(stores, run, monkeypatch):
    from hybrid_tools.predictor_training import memory  # noqa: PLC0415

    monkeypatch.setattr(memory, "training_bytes", lambda *_: 1 << 40)
    code, out, err = run("train", stores / "dense", *EASY, "--ram", "64G")
    assert (code, out) == (2, "")
    assert re.search(r"--ram 64\.00 GiB: the model needs 1\.\d+ TiB|--ram 64\.00 GiB: the model needs 10\d\d", err[-1])


def test_the_share_of_the_networks_time_is_told(stores, run):
    answer = json.loads(run("train", stores / "dense", *EASY, "--threads", "1", "--json")[1])
    assert 0 < answer["share_of_time"] < 1


def powerinfer(folder, config: ModelConfig, rank=6, threshold=None):
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for layer_idx in range(config["num_hidden_layers"]):
        state = {
            "fc1.weight": torch.randn(rank, config["hidden_size"], generator=generator),
            "fc2.weight": torch.randn(config["intermediate_size"], rank, generator=generator),
        }
        torch.save(state, folder / f"model_{layer_idx}.pt")
    if threshold is not None:
        (folder / "config.json").write_text(json.dumps({"sparse_threshold": threshold}))
    return folder


def test_powerinfers_predictors_are_imported_and_run(stores, run, tmp_path):
    source = powerinfer(tmp_path / "predictors", DENSE, threshold=-0.5)
    code, out, err = run("import", stores / "dense", source, "--rows", "f32")
    assert code == 0, err
    header = json.loads((stores / "dense" / "predictors" / PREDICTORS).read_text())
    assert out.strip() == str(stores / "dense" / "predictors")
    assert header["input"] == "pre_norm"
    assert [layer["threshold"] for layer in header["layers"]] == [-0.5, -0.5]
    opened = open_model(ModelRequest(str(stores / "dense")), LoadOptions(num_positions=64, predictor="trained"))
    decoder: Decoder = opened.load_sequence().decoder
    weights = torch.load(source / "model_1.pt", weights_only=True)
    predictor = decoder.weights.layers[1].experts[0].predictor
    inputs = torch.randn(4, DENSE["hidden_size"])
    expected = torch.relu(inputs @ weights["fc1.weight"].bfloat16().float().T) @ weights[
        "fc2.weight"
    ].bfloat16().float().T  # fmt: skip
    torch.testing.assert_close(predictor.logits(inputs, decoder.team), expected, atol=1e-4, rtol=1e-4)
    tokens = torch.arange(5, 25)
    assert decoder.forward(tokens, KvCache(decoder.config, 64, "f32")).isfinite().all()


def test_layers_are_imported_in_the_order_of_their_numbers(tmp_path):
    from hybrid_tools.predictor_training.powerinfer import predictor_files  # noqa: PLC0415

    config = type("Config", (), {"num_experts": 0, "num_hidden_layers": 12})
    for idx in range(12):
        (tmp_path / f"model_{idx}.pt").touch()
    assert [path.name for path in predictor_files(tmp_path, config)] == [f"model_{idx}.pt" for idx in range(12)]


class Planted:
    """Pickles into a call that leaves a file behind."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda source: (source / "model_1.pt").unlink(),
            r"lacks or adds model_1\.pt; expected model_0\.pt to model_1",
        ),
        (lambda source: (source / "model_2.pt").touch(), r"lacks or adds model_2\.pt"),
        (lambda source: (source / "model_0.pt").write_bytes(b"no archive"), r"model_0\.pt: is not a file that torch"),
        (
            lambda source: torch.save({"fc1.weight": torch.ones(2, 2)}, source / "model_0.pt"),
            "does not hold fc1.weight",
        ),
        (
            lambda source: torch.save(
                {"fc1.weight": torch.ones(2, 9), "fc2.weight": torch.ones(48, 2)}, source / "model_0.pt"
            ),
            r"fc1 is \(2, 9\) and fc2 \(48, 2\), expected \(rank, 32\)",
        ),
        (
            lambda source: torch.save(
                {"fc1.weight": torch.full((2, 32), torch.nan), "fc2.weight": torch.ones(48, 2)}, source / "model_0.pt"
            ),
            r"fc1.weight holds NaN or Inf",
        ),
        (lambda source: torch.save(Planted(source / "ran"), source / "model_0.pt"), "holds more than tensors"),
        (
            lambda source: torch.save(torch.zeros(10_000_000), source / "model_0.pt"),
            r"is 40\d+ bytes, expected at most",
        ),
        (lambda source: (source / "config.json").write_text('{"sparse_threshold": "a"}'), "sparse_threshold is 'a'"),
    ],
    ids=["missing", "additional", "no-archive", "names", "shapes", "nan", "code", "size", "threshold"],
)
def test_files_that_are_no_predictors_are_refused_by_name(stores, run, tmp_path, spoil, message):
    source = powerinfer(tmp_path / "predictors", DENSE)
    spoil(source)
    code, out, err = run("import", stores / "dense", source)
    assert (code, out) == (2, "")
    assert len(err) == 1
    assert re.search(message, err[0]), err
    assert not (source / "ran").exists()


def test_mixtures_have_no_predictors_of_powerinfers(stores, run, tmp_path):
    code, _, err = run("import", stores / "mixture", powerinfer(tmp_path / "predictors", DENSE))
    assert code == 2
    assert "this one has experts" in err[0]


def test_what_is_missing_is_named_with_what_makes_it(stores, run, tmp_path, capsys):
    shutil.copytree(stores / "dense", tmp_path / "dense", ignore=shutil.ignore_patterns("profile", "predictors"))
    code, _, err = run("train", tmp_path / "dense")
    assert code == 2
    assert "run hybrid-profile" in err[-1]
    from hybrid_runtime.cli.run import main as hybrid_run  # noqa: PLC0415

    assert hybrid_run(["--model", str(tmp_path / "dense"), "-p", "Hello", "--predictor", "trained"]) == 2
    assert "nobody has trained predictors for dense-checkpoint yet" in capsys.readouterr().err


def test_damaged_predictors_are_refused_by_name(stores, run, tmp_path):
    assert run("train", stores / "dense", *EASY, "--threads", "1")[0] == 0
    for file, spoil, message in (
        (PREDICTORS, lambda path: path.write_text("{}"), "is None version None, expected 'hybrid-runtime predictors'"),
        (PREDICTORS, lambda path: path.write_text(path.read_text().replace('"rank": ', '"rank": -')), "has rank -"),
        ("data-*/layer-00001.safetensors", lambda path: path.unlink(), "layer-00001.safetensors: is missing"),
        ("data-*/layer-00000.safetensors", lambda path: path.write_bytes(b"x"), "cannot be read as safetensors"),
    ):
        folder = tmp_path / message[:9]
        shutil.copytree(stores / "dense", folder)
        (path,) = (folder / "predictors").glob(file)
        spoil(path)
        code, _, err = run("compare", folder, "--threads", "1")
        assert code == 2
        assert message in err[-1]
        assert "run hybrid-predictors train again" in err[-1]


def test_share_that_no_predictors_fit_is_refused_before_any_is_trained(stores, run, monkeypatch):
    from hybrid_tools.predictor_training import run as module  # noqa: PLC0415

    monkeypatch.setattr(module, "train_layer", interrupt)
    code, out, err = run("train", stores / "dense", "--max-share", "0.001", "--threads", "1")
    assert (code, out) == (2, "")
    found = re.search(r"--max-share 0.001: the narrowest predictors take (0\.\d+) of the neurons' bytes", err[-1])
    code, _, _ = run("train", stores / "dense", "--max-share", found[1], "--threads", "1")
    assert code == 130, "this share is enough to begin with"
