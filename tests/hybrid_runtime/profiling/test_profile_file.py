"""What a profile's files may not be, each refused by name with what to do."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_runtime.errors import CheckpointError
from hybrid_runtime.profiling.profile_file import COUNTS, has_profile, read_header, read_profile, read_samples
from hybrid_runtime.store.beside import store_digest

from .conftest import text_of


@pytest.fixture(scope="module")
def made(small):
    return small.profile("made", text_of(4, 40))


@pytest.fixture
def folder(made, tmp_path):
    """A copy to do damage to."""
    return shutil.copytree(made, tmp_path / "profile")


def data_of(folder):
    (data,) = folder.glob("data-*")
    return data


def change_header(folder, **values):
    path = folder / "profile.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_counts(folder, **changes):
    """Replace tensors (None: leave out) in a file that profile.json vouches for."""
    path = data_of(folder) / COUNTS
    tensors = load_file(path)
    for name, change in changes.items():
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name]).contiguous() if name in tensors else change(None)
    save_file(tensors, path)
    change_header(folder, counts_sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def change_samples(folder, name, change):
    path = data_of(folder) / "samples-00001.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path)
    digests = list(read_header(folder).samples_sha256)
    digests[1] = hashlib.sha256(path.read_bytes()).hexdigest()
    change_header(folder, samples_sha256=digests)


def test_what_was_written_is_read(small, folder):
    profile = read_profile(folder, small.config, store_digest(small.store))
    header = read_header(folder)
    assert has_profile(folder)
    assert profile.window == header.window
    assert profile.num_tokens == header.texts[0].num_tokens > 0
    assert len(profile.held_out) == 2  # of 32 windows and some
    assert profile.num_tokens >= 30 * profile.window
    passes = profile.num_tokens * max(1, small.config.num_experts_per_tok)
    for layer_idx, layer in enumerate(profile.layers):
        assert int(layer.tokens.sum()) == passes
        samples = read_samples(folder, small.config, layer_idx)
        assert len(samples.priorities) == header.num_samples > 0
        pairs = layer.co_fired.diagonal(dim1=1, dim2=2)
        assert torch.equal(pairs, layer.fired[:, profile.watched])
        assert 0 < profile.zero_share(layer_idx) < 1


HEADERS = {
    "other-format": ({"format": "a cake"}, "is 'a cake' version 1, expected 'hybrid-runtime profile' version 1"),
    "other-version": ({"version": 2}, "version 2, expected"),
    "outside": ({"data": "../../etc"}, "data is '../../etc', expected data-<16 hex digits>"),
    "no-window": ({"window": 0}, "a count of tokens is below 1"),
    "fraction": ({"window": 2.5}, "profile.json.window is 2.5, expected int"),
    "negative-samples": ({"num_samples": -1}, "a count of tokens is below 1"),
    "field-too-many": ({"owner": "me"}, "has unknown \\['owner'\\]; it is of another version"),
    "texts": ({"texts": [{"sha256": "0"}]}, "lacks \\['num_tokens'\\]"),
    "no-tokens": ({"texts": [{"sha256": "0", "num_tokens": 0}]}, "a count of tokens is below 1"),
    "other-model": ({"model_digest": "0" * 64}, "is of .*, store 000000000000, expected .*converted anew since"),
    "other-counts": ({"counts_sha256": "0" * 64}, "is missing or not as profile.json has it"),
    "absurd-window": ({"window": 10**30}, "held_out has shape"),
    "absurd-tokens": ({"texts": [{"sha256": "0", "num_tokens": 10**400}]}, "tokens sum to"),
}


@pytest.mark.parametrize(("values", "message"), HEADERS.values(), ids=HEADERS)
def test_headers_that_cannot_be_are_refused(small, folder, values, message):
    change_header(folder, **values)
    with pytest.raises(CheckpointError, match=message) as refused:
        read_profile(folder, small.config, store_digest(small.store))
    assert "run hybrid-profile again" in str(refused.value)
    assert str(folder) in str(refused.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1, "format": 2}', "\udcff", '{"format": NaN}', "[" * 100_000]
)
def test_what_is_no_json_object_is_refused(small, folder, text):
    (folder / "profile.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"profile\.json"):
        read_profile(folder, small.config)


COUNT_FAULTS = {
    "missing": ({"layers.0.fired": None}, "lacks or adds layers.0.fired"),
    "too-many": ({"extra": lambda _: torch.zeros(1)}, "lacks or adds extra"),
    "type": ({"layers.0.tokens": lambda old: old.int()}, "layers.0.tokens is torch.int32, expected torch.int64"),
    "neurons": ({"layers.0.fired": lambda old: old[:, :-1]}, r"layers.0.fired has shape .*, expected"),
    "pairs": ({"layers.1.co_fired": lambda old: old[:, :-1]}, r"layers.1.co_fired has shape .*, expected pairs of"),
    "follows": ({"layers.1.follows": lambda _: torch.ones(1, 1).long()}, "layers.1.follows has shape"),
    "negative": ({"layers.0.active_squares": lambda old: -old - 1}, "layers.0.active_squares has a count below 0"),
    "tokens": ({"layers.0.tokens": lambda old: old + 1}, r"layers.0.tokens sum to \d+, expected \d+"),
    "too-often": ({"layers.0.fired": lambda old: old + 10**9}, "layers.0.fired is more often than its expert got"),
    "watched": ({"watched": lambda old: old + 10**6}, "watched names neurons outside 0 to 47"),
    "held-out": ({"held_out": lambda old: old + 10**6}, "held_out has tokens outside 0 to"),
    "held-out-width": ({"held_out": lambda old: old[:, 1:]}, "held_out has shape"),
}


@pytest.mark.parametrize(("changes", "message"), COUNT_FAULTS.values(), ids=COUNT_FAULTS)
def test_counts_that_cannot_be_are_refused(small, folder, changes, message):
    change_counts(folder, **changes)
    with pytest.raises(CheckpointError, match=message) as refused:
        read_profile(folder, small.config, store_digest(small.store))
    assert str(refused.value).endswith("run hybrid-profile again")
    assert COUNTS in str(refused.value)


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "one-bit"])
def test_damaged_counts_are_refused(small, folder, damage):
    do_damage(data_of(folder) / COUNTS, damage)
    with pytest.raises(CheckpointError, match=r"counts.safetensors: is missing or not as .*; run hybrid-profile again"):
        read_profile(folder, small.config)


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "folder", "one-bit"])
def test_damaged_samples_are_refused(small, folder, damage):
    do_damage(data_of(folder) / "samples-00001.safetensors", damage)
    read_samples(folder, small.config, 0)
    with pytest.raises(CheckpointError, match=r"samples-00001.safetensors: .*; run hybrid-profile again"):
        read_samples(folder, small.config, 1)


def test_samples_of_a_profile_without_their_digests_are_read(small, folder):
    """As profiles were written before."""
    path = folder / "profile.json"
    values = json.loads(path.read_text())
    assert len(values.pop("samples_sha256")) == small.config.num_hidden_layers
    path.write_text(json.dumps(values))
    read_profile(folder, small.config, store_digest(small.store))
    assert len(read_samples(folder, small.config, 1).priorities) == values["num_samples"]


def test_digests_of_too_few_layers_are_refused(small, folder):
    change_header(folder, samples_sha256=list(read_header(folder).samples_sha256[:1]))
    read_samples(folder, small.config, 0)
    with pytest.raises(CheckpointError, match=r"samples-00001.safetensors: is not as profile.json has it"):
        read_samples(folder, small.config, 1)


def do_damage(path, damage):
    data = bytearray(path.read_bytes())
    path.unlink()
    data[len(data) // 2] ^= 1
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "one-bit": data}[damage])


SAMPLE_FAULTS = {
    "rows": ("inputs", lambda old: old[1:], "inputs has shape"),
    "width": ("active", lambda old: old[:, :, 1:], "active has shape"),
    "type": ("inputs", lambda old: old.float(), "inputs is torch.float32, expected torch.float16"),
    "experts": ("experts", lambda old: old + 100, "experts are outside 0 to"),
    "order": ("priorities", lambda old: old.flip(0), "priorities do not ascend"),
    "nan": ("inputs", lambda old: old * torch.nan, "inputs are not finite"),
}


@pytest.mark.parametrize(("name", "change", "message"), SAMPLE_FAULTS.values(), ids=SAMPLE_FAULTS)
def test_samples_that_cannot_be_are_refused(small, folder, name, change, message):
    change_samples(folder, name, change)
    with pytest.raises(CheckpointError, match=rf"samples-00001.safetensors: {message}.*; run hybrid-profile again"):
        read_samples(folder, small.config, 1)


def test_absurd_number_of_samples_is_refused(small, folder):
    change_header(folder, num_samples=10**18)
    with pytest.raises(CheckpointError, match=r"samples-00000.safetensors: .* has shape"):
        read_samples(folder, small.config, 0)


@pytest.fixture(scope="module")
def short(small):
    return small.profile("short", text_of(4, 3))


@pytest.mark.parametrize("name", [COUNTS, "profile.json", "samples-00001.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "one-bit"])
def test_the_remedy_mends_it(small, short, name, damage):
    """What was damaged is made again, with the same bytes."""
    path = short / name if name == "profile.json" else data_of(short) / name
    before = path.read_bytes()
    do_damage(path, damage)
    small.profile("short", text_of(4, 3))
    assert path.read_bytes() == before
