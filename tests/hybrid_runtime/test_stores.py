"""From a name to a store: what is found, what is converted into what, and what is refused before any work."""

import shutil
import threading
from dataclasses import dataclass, field

import pytest

from hybrid_runtime.demo import DEMO_NAME, make_demo
from hybrid_runtime.errors import CheckpointError, TokenizerError, UsageError
from hybrid_runtime.progress import NoProgress
from hybrid_runtime.store.convert import Conversion
from hybrid_runtime.store.reader import Store
from hybrid_runtime.stores import (
    LARGEST_F32_PARAMETERS,
    ModelRequest,
    choose_quantization,
    convert_model,
    find_model,
    load_store_tokenizer,
)

from .model.conftest import one_thread  # noqa: F401
from .small_models import LLAMA, TEMPLATE, write_model


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("published") / "llama", template=TEMPLATE)


def find(name, cache, **request):
    return find_model(ModelRequest(str(name), **request), cache, NoProgress())


def open_model(name, cache, **request):
    said = []
    store = find(name, cache, **request).open(NoProgress(), said.append)
    return store, said


def test_finding_writes_nothing_and_opening_converts_once(published, tmp_path):
    found = find(published, tmp_path / "cache")
    assert isinstance(found.source, Conversion)
    assert not (tmp_path / "cache").exists()
    store, said = open_model(published, tmp_path / "cache")
    assert said == [f"converting llama to f32 in {store.folder}"]
    again, said = open_model(published, tmp_path / "cache")
    assert (again, said) == (store, [])


def test_what_is_found_says_what_it_will_take(published, tmp_path):
    planned = find(published, tmp_path, quant="q8")
    store, _ = open_model(published, tmp_path, quant="q8")
    found = find(published, tmp_path, quant="q8")
    assert isinstance(found.source, Store)
    assert (planned.config, planned.weights, planned.num_bytes) == (found.config, found.weights, found.num_bytes)
    assert planned.num_bytes == store.num_bytes == sum(path.stat().st_size for path in store.data_folder.glob("*.bin"))
    assert planned.largest_converted_bytes == 4 * LLAMA["hidden_size"] * LLAMA["intermediate_size"]
    assert found.largest_converted_bytes == 0


def test_each_quantisation_and_each_source_has_a_store_of_its_own(published, tmp_path):
    other = write_model(tmp_path / "llama", seed=3)
    stores = [open_model(published, tmp_path / "cache", quant=quant)[0].folder for quant in ("f32", "q8", "q4")]
    stores.append(open_model(published, tmp_path / "cache", quant="q4", group=64)[0].folder)
    stores.append(open_model(other, tmp_path / "cache")[0].folder)
    stores.append(open_model(published, tmp_path / "cache", ffn_activation="relu_glu")[0].folder)
    assert len(set(stores)) == 6
    assert {folder.name.split("-")[0] for folder in stores} == {"llama"}


def test_changed_weights_are_converted_anew(tmp_path):
    folder = write_model(tmp_path / "llama")
    first, _ = open_model(folder, tmp_path / "cache")
    shutil.rmtree(folder)
    write_model(folder, seed=9)
    second, said = open_model(folder, tmp_path / "cache")
    assert said
    assert second.folder != first.folder


def test_a_template_added_later_is_seen(tmp_path):
    folder = write_model(tmp_path / "llama")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    store, _ = open_model(folder, tmp_path / "cache")
    assert load_store_tokenizer(store)[1] is None
    (folder / "chat_template.jinja").write_text("new")
    again, _ = open_model(folder, tmp_path / "cache")
    assert load_store_tokenizer(again)[1] == "new"


def test_damaged_store_in_the_cache_is_made_again(published, tmp_path):
    store, _ = open_model(published, tmp_path)
    part = next(store.data_folder.glob("layer-*.bin"))
    part.write_bytes(part.read_bytes()[:-1])
    again, said = open_model(published, tmp_path)
    assert len(said) == 1
    again.verify()


def test_tokenizer_and_template_come_back_from_the_store(published, tmp_path):
    store, _ = open_model(published, tmp_path)
    tokenizer, template = load_store_tokenizer(store)
    assert template == TEMPLATE
    assert tokenizer.decode(tokenizer.encode("Hello world")) == "Hello world"


@dataclass
class Sized:
    """A checkpoint of which only the number of weights matters."""

    parameters: int
    tensors: dict = field(default_factory=dict)

    def num_parameters(self):
        return self.parameters


@pytest.mark.parametrize(
    ("quant", "group", "parameters", "expected"),
    [
        (None, None, LARGEST_F32_PARAMETERS, "f32"),
        (None, None, LARGEST_F32_PARAMETERS + 1, "q4 group 32"),
        (None, 64, LARGEST_F32_PARAMETERS + 1, "q4 group 64"),
        ("bf16", None, 7, "bf16"),
        ("q8", 128, 7, "q8 group 128"),
        ("f32", None, 10**12, "f32"),
    ],
)
def test_small_models_stay_exact_and_large_ones_become_q4_unless_asked(quant, group, parameters, expected):
    assert str(choose_quantization(ModelRequest("m", quant, group), Sized(parameters)).weights) == expected


@pytest.mark.parametrize(("quant", "group"), [("q4", 48), ("f32", 32), (None, 32), ("q3", None)])
def test_what_no_row_can_be_is_refused(quant, group):
    with pytest.raises(UsageError, match=r"--group|--quant"):
        choose_quantization(ModelRequest("m", quant, group), Sized(7))


def test_broken_weights_leave_no_half_of_a_store(tmp_path):
    folder = write_model(tmp_path / "llama")
    config = (folder / "config.json").read_text()
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-4:] = b"\xff\xff\xff\x7f"  # a NaN in the last tensor, so that other parts are written first
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_text(config)
    found = find(folder, tmp_path / "cache")
    with pytest.raises(CheckpointError, match="found nan"):
        found.open(NoProgress(), print)
    left = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert left == [".lock"]  # which another program may be waiting for


def test_model_without_a_tokenizer_can_be_converted_but_not_run(tmp_path):
    folder = write_model(tmp_path / "llama")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"without a tokenizer.*tokenizer\.json"):
        find(folder, tmp_path / "cache")
    store = convert_model(ModelRequest(str(folder)), tmp_path / "store", tmp_path, NoProgress())
    with pytest.raises(TokenizerError, match="without a tokenizer"):
        load_store_tokenizer(store)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"quant": "q4"}, "--quant q4.*is a store in f32"),
        ({"ffn_activation": "relu_glu"}, "--ffn-activation.*was fixed when it was converted"),
        ({"revision": "main"}, "--revision main"),
    ],
    ids=["quant", "activation", "revision"],
)
def test_store_is_opened_only_as_what_it_is(published, tmp_path, request_, message):
    store = convert_model(ModelRequest(str(published)), tmp_path / "store", tmp_path, NoProgress())
    assert find(store.folder, tmp_path / "cache", quant="f32").source == store
    with pytest.raises(UsageError, match=message):
        find(store.folder, tmp_path / "cache", **request_)
    with pytest.raises(UsageError, match="is a store already"):
        convert_model(ModelRequest(str(store.folder)), tmp_path / "other", tmp_path, NoProgress())


def test_home_is_expanded_and_strange_homes_are_no_traceback(published, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(published.parent))
    assert find("~/llama", tmp_path).source.model == "llama"
    with pytest.raises(UsageError, match="no such path"):
        find("~no-such-user/llama", tmp_path)


def test_demo_made_by_many_at_once_is_whole(tmp_path):
    folder, failures = tmp_path / "cache" / "demo", []

    def make():
        try:
            assert (make_demo(folder) / "config.json").is_file()
        except Exception as error:  # noqa: BLE001  # whatever it is, the test must see it
            failures.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [path.name for path in folder.parent.iterdir()] == ["demo"]
    assert find(DEMO_NAME, tmp_path / "cache").config.family == "turbosparsemixtral"
