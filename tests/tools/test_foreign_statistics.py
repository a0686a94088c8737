"""Statistics of others: layers in numeric order, counts and nothing else, archives that would hurt refused unread."""

import json
import re
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hybrid_kernels.activation import Activation
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import HybridError, UnsupportedModel, UsageError
from hybrid_runtime.profiling.profile_file import read_profile, read_samples
from hybrid_tools.foreign_statistics import (
    powerinfer_files,
    read_arrays,
    read_expert_popularity,
    read_histograms,
    read_powerinfer_statistics,
    save_imported,
)

NUM_LAYERS, NUM_NEURONS = 12, 40
DIGEST = "ab" * 32


def config_of(num_experts=0):
    return ModelConfig(
        family="llama",
        vocab_size=64,
        hidden_size=16,
        intermediate_size=NUM_NEURONS,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        activation=Activation("relu_glu"),
        norm_eps=1e-5,
        num_experts=num_experts,
        num_experts_per_tok=2 if num_experts else 0,
    )


CONFIG = config_of()


def counts_of(layer_idx):
    return torch.arange(NUM_NEURONS) * 100 + layer_idx  # the ones digit(s) tell the layer


def write_folder(folder, suffixes=(".pt", ".npy", ".npz", ".safetensors")):
    """One layer's file after the other, in every format in turn."""
    folder.mkdir()
    for layer_idx in range(NUM_LAYERS):
        counts, suffix = counts_of(layer_idx), suffixes[layer_idx % len(suffixes)]
        path = folder / f"activation_{layer_idx}{suffix}"
        if suffix == ".pt":
            torch.save(counts, path)
        elif suffix == ".npy":
            np.save(path, counts.numpy().astype(np.uint32))
        elif suffix == ".npz":
            np.savez_compressed(path, counts.numpy().astype(np.float32))
        else:
            save_file({"counts": counts.int()}, path)
    return folder


def read(folder, num_tokens=None, config=CONFIG):
    return read_powerinfer_statistics(folder, config, "a model", DIGEST, num_tokens)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "activation")


def test_layers_come_in_the_order_of_their_numbers(folder):
    """As names, activation_10 and activation_11 come before activation_2: PowerInfer's own reader mixed them up."""
    assert sorted(path.name for path in folder.iterdir())[2].startswith("activation_10")
    names = [path.stem for path in powerinfer_files(folder, CONFIG)]
    assert names == [f"activation_{idx}" for idx in range(NUM_LAYERS)]
    for layer_idx, layer in enumerate(read(folder).layers):
        assert torch.equal(layer.fired, counts_of(layer_idx).unsqueeze(0))


def test_tokens_are_the_callers_or_the_largest_count(folder):
    largest = 100 * (NUM_NEURONS - 1) + NUM_LAYERS - 1
    assert read(folder).num_tokens == largest
    profile = read(folder, 10_000)
    assert profile.num_tokens == 10_000
    assert [layer.tokens.tolist() for layer in profile.layers] == [[10_000]] * NUM_LAYERS
    assert profile.zero_share(0) == pytest.approx(1 - counts_of(0).double().mean().item() / 10_000)
    with pytest.raises(UsageError, match=f"{largest - 1} tokens: a neuron in .* fired {largest} times"):
        read(folder, largest - 1)


def test_more_tokens_than_a_profile_can_hold_are_refused(folder):
    most = (1 << 62) // NUM_NEURONS**2
    assert read(folder, most).layers[0].active_squares.item() > 0
    with pytest.raises(UsageError, match=f"{most + 1} tokens: a profile of 40 neurons a layer holds at most {most}"):
        read(folder, most + 1)


def test_neurons_count_as_independent_where_nobody_counted_pairs(folder):
    profile = read(folder, 10_000)
    assert profile.watched.shape == (0,)
    for layer_idx in range(NUM_LAYERS):
        assert profile.spread(layer_idx) == pytest.approx(1, abs=1e-3)


def test_imported_profile_is_read_back_whole(folder, tmp_path):
    profile = read(folder, 10_000)
    saved = save_imported(profile, CONFIG, tmp_path / "profile")
    again = read_profile(tmp_path / "profile", CONFIG, DIGEST)
    for each in (saved, again):
        assert (each.model, each.texts, each.num_tokens) == (profile.model, profile.texts, 10_000)
        for ours, theirs in zip(each.layers, profile.layers, strict=True):
            assert torch.equal(ours.fired, theirs.fired)
            assert torch.equal(ours.active_squares, theirs.active_squares)
    for layer_idx in range(NUM_LAYERS):
        samples = read_samples(tmp_path / "profile", CONFIG, layer_idx)
        assert samples.inputs.shape == (0, CONFIG.hidden_size)
        assert samples.of_expert(0, NUM_NEURONS)[1].shape == (0, NUM_NEURONS)


def test_importing_again_takes_the_place_of_what_was_there(folder, tmp_path):
    save_imported(read(folder, 10_000), CONFIG, tmp_path / "profile")
    save_imported(read(folder, 20_000), CONFIG, tmp_path / "profile")
    assert read_profile(tmp_path / "profile", CONFIG).num_tokens == 20_000
    assert len(list((tmp_path / "profile").glob("data-*"))) == 1


def test_mixtures_are_refused(folder):
    with pytest.raises(UnsupportedModel, match="this one has experts"):
        read(folder, config=config_of(num_experts=4))


class Planted:
    """Pickles into a call that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def bomb(path, member, num_bytes=20_000_000):
    """A small archive of zeros that unpack to much."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(member, "w") as stream:
        for _ in range(num_bytes // 1_000_000):
            stream.write(bytes(1_000_000))
    assert path.stat().st_size < num_bytes // 500


def lying_header(path, shape, dtype="<i8"):
    """A .npy whose header promises what does not follow."""
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(10 + len(header) + 1) % 64) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64))


def saved(values):
    return lambda folder: torch.save(values, folder / "activation_0.pt")


def numpy_saved(values):
    return lambda folder: np.save(folder / "activation_1.npy", values)


ONES = torch.ones(NUM_NEURONS)
SPOILT = {
    "missing": (lambda folder: (folder / "activation_4.pt").unlink(), "lacks or adds activation_4; expected"),
    "additional": (lambda folder: (folder / "activation_12.pt").touch(), "lacks or adds activation_12"),
    "twice": (
        lambda folder: (folder / "activation_4.npy").touch(),
        r"activation_4\.npy and activation_4\.pt are both of layer 4",
    ),
    "twice-by-zeros": (lambda folder: (folder / "activation_007.pt").touch(), "are both of layer 7"),
    "length": (saved(torch.ones(NUM_NEURONS + 1, dtype=int)), r"activation_0\.pt: has shape \(41,\), expected \(40,\)"),
    "dimensions": (saved(torch.ones(2, NUM_NEURONS, dtype=int)), r"has shape \(2, 40\)"),
    "negative": (saved(-ONES.int()), r"activation_0\.pt: holds a count below 0"),
    "nan": (saved(ONES * float("nan")), r"activation_0\.pt: holds NaN or Inf"),
    "fractions": (saved(ONES / 2), r"activation_0\.pt: holds fractions"),
    "bool": (saved(ONES.bool()), r"activation_0\.pt: holds torch\.bool"),
    "complex": (saved(ONES.to(torch.complex64)), r"holds torch\.complex64"),
    "absurd": (saved(ONES.double() * 2.0**60), "holds a count below 0 or above"),
    "dictionary": (saved({"counts": ONES}), "holds dict, expected one dense tensor"),
    "sparse": (saved(ONES.to_sparse()), "expected one dense tensor"),
    "no-archive": (lambda folder: (folder / "activation_0.pt").write_bytes(b"abc"), r"activation_0\.pt: is not a file"),
    "large": (saved(torch.zeros(10_000_000)), r"activation_0\.pt: is 40\d+ bytes, expected at most"),
    "bomb-pt": (
        lambda folder: bomb(folder / "activation_0.pt", "archive/data/0"),
        r"activation_0\.pt: unpacks to 20000000 bytes",
    ),
    "bomb-npz": (
        lambda folder: bomb(folder / "activation_2.npz", "counts.npy"),
        r"activation_2\.npz: 'counts\.npy' unpacks to 20000000",
    ),
    "code": (
        lambda folder: torch.save(Planted(folder / "ran"), folder / "activation_0.pt"),
        r"activation_0\.pt: holds more than tensors",
    ),
    "code-npy": (
        numpy_saved(np.array([Planted("ran")] * NUM_NEURONS, dtype=object)),
        r"activation_1\.npy: holds object",
    ),
    "npy-promises-more": (
        lambda folder: lying_header(folder / "activation_1.npy", (NUM_NEURONS,)),
        r"activation_1\.npy: does not hold the 320 bytes",
    ),
    "npy-promises-absurd": (
        lambda folder: lying_header(folder / "activation_1.npy", (1 << 50,)),
        r"activation_1\.npy: is \d+ bytes, expected at most 320",
    ),
    "npy-negative": (lambda folder: lying_header(folder / "activation_1.npy", (-1,)), r"expected at most 320"),
    "npy-no-header": (
        lambda folder: (folder / "activation_1.npy").write_bytes(b"\x93NUMPY\x01\x00\x05\x00abc"),
        "1.npy",
    ),
    "npy-damaged-header": (
        lambda folder: (folder / "activation_1.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((("),
        r"activation_1\.npy: has no header",
    ),
    "npz-damaged": (lambda folder: (folder / "activation_2.npz").write_bytes(b"PK"), r"activation_2\.npz: cannot be"),
    "npz-two": (
        lambda folder: np.savez(folder / "activation_2.npz", ONES, ONES),
        r"activation_2\.npz: holds 2 arrays, expected 1 to 1",
    ),
    "safetensors-damaged": (
        lambda folder: (folder / "activation_3.safetensors").write_bytes(b"abc"),
        r"activation_3\.safetensors: cannot be read",
    ),
    "safetensors-two": (
        lambda folder: save_file({"a": ONES, "b": ONES.clone()}, folder / "activation_3.safetensors"),
        r"activation_3\.safetensors: holds 2 tensors, expected one",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_are_no_counts_of_this_model_is_refused_by_name(folder, monkeypatch, case):
    spoil, message = SPOILT[case]
    monkeypatch.chdir(folder)
    spoil(folder)
    with pytest.raises(HybridError, match=message):
        read(folder)
    assert not (folder / "ran").exists()


def test_code_in_a_file_would_have_run_in_a_reader_that_unpickles(tmp_path):
    """The control: the planted pickle does what it is for."""
    torch.save(Planted(tmp_path / "ran"), tmp_path / "planted.pt")
    with torch.load(tmp_path / "planted.pt", weights_only=False):
        assert (tmp_path / "ran").exists()


def test_nothing_that_fired_is_no_profile(tmp_path):
    folder = tmp_path / "activation"
    folder.mkdir()
    for layer_idx in range(NUM_LAYERS):
        torch.save(torch.zeros(NUM_NEURONS, dtype=int), folder / f"activation_{layer_idx}.pt")
    with pytest.raises(HybridError, match="no neuron of any layer fired"):
        read(folder)
    with pytest.raises(HybridError, match="no such folder"):
        read(tmp_path / "elsewhere")


def test_an_archive_as_a_whole_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("hybrid_tools.foreign_statistics.MOST_UNPACKED_BYTES", 1000)
    np.savez(tmp_path / "a.npz", a=ONES, b=ONES, c=ONES, d=ONES)
    with pytest.raises(HybridError, match=r"a\.npz: unpacks to \d+ bytes, expected at most 1000"):
        read_arrays(tmp_path / "a.npz", most_arrays=9, most_bytes=999)


def test_popularity_gives_places_and_ranks(tmp_path):
    path = tmp_path / "order.json"
    path.write_text(json.dumps({"note": "", "order": [[1, 0], [0, 2], [0, 0], [1, 2], [1, 1], [0, 1]]}))
    popularity = read_expert_popularity(path)
    assert (popularity.num_layers, popularity.num_experts) == (2, 3)
    assert popularity.places().tolist() == [[2, 5, 1], [0, 4, 3]]
    assert popularity.ranks().tolist() == [[1, 2, 0], [0, 2, 1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "order is None"),
        ('{"order": []}', "order is a list of 0"),
        ('{"order": [[0, 0], [0]]}', "order holds a list of 1"),
        ('{"order": [[0, true]]}', "two whole numbers"),
        ('{"order": [[0, -1], [0, 0]]}', "these are no indices"),
        ('{"order": [[0, 99999999]]}', "these are no indices"),
        ('{"order": [[0, 0], [0, 0]]}', "has 2 pairs, 1 of them different, expected each of 1 x 1 once"),
        ('{"order": [[0, 0], [1, 1]]}', "expected each of 2 x 2 once"),
        ("[", "is not JSON"),
    ],
)
def test_what_is_no_order_of_experts_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "order.json"
    path.write_text(text)
    with pytest.raises(HybridError, match=f"{re.escape(str(path))}.*{message}"):
        read_expert_popularity(path)


def histograms(num_layers=11, **replaced):
    values = {}
    for layer_idx in range(num_layers):
        name = f"layer_{layer_idx:02d}.mlp.h2"
        values |= {name: np.array([5, 10, 50, 25, 10], dtype=np.int32), f"{name}_centers": np.arange(-2.0, 3.0)}
    return {name: value for name, value in (values | replaced).items() if value is not None}


def test_histograms_give_magnitudes(tmp_path):
    np.savez(tmp_path / "h.npz", **histograms())
    read = read_histograms(tmp_path / "h.npz")
    assert read.num_layers == 11
    (tensor,) = read.by_tensor
    assert tensor == "mlp.h2"
    histogram = read.by_tensor[tensor][10]
    assert histogram.num_values == 100
    assert [histogram.magnitude_of(share) for share in (0.1, 0.5, 0.51, 0.85, 0.86, 1.0)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"layer_03.mlp.h2": None, "layer_03.mlp.h2_centers": None}, "lacks or adds mlp.h2 of layer 3"),
        ({"layer_03.mlp.h2_centers": None}, "holds 'layer_03.mlp.h2', expected"),
        ({"anything": np.ones(3)}, "holds 'anything', expected"),
        ({"layer_3.mlp.h2": np.ones(3), "layer_3.mlp.h2_centers": np.ones(3)}, "mlp.h2 of layer 3 twice"),
        ({"layer_03.mlp.h2": np.array([1, 2])}, "has 2 counts and 5 centers"),
        ({"layer_03.mlp.h2": np.array([1, 2, 3, 4, -5])}, "holds what are no counts"),
        ({"layer_03.mlp.h2": np.zeros(5, dtype=int)}, "holds what are no counts"),
        ({"layer_03.mlp.h2": np.ones(5)}, "holds what are no counts"),
        ({"layer_03.mlp.h2_centers": np.array([0, 1, 2, 3, np.nan])}, "are not ascending numbers"),
        ({"layer_03.mlp.h2_centers": np.array([0, 1, 2, 1, 0])}, "are not ascending numbers"),
        ({"layer_03.mlp.h2": np.ones((5, 1))}, r"has shape \(5, 1\)"),
    ],
)
def test_what_are_no_histograms_is_refused_by_name(tmp_path, replaced, message):
    np.savez(tmp_path / "h.npz", **histograms(**replaced))
    with pytest.raises(HybridError, match=f"{re.escape(str(tmp_path / 'h.npz'))}.*{message}"):
        read_histograms(tmp_path / "h.npz")
