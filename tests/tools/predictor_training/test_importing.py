"""Imported predictors are the files' numbers, and come whole or not at all."""

import filelock
import pytest
import torch

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.errors import CheckpointError, UsageError
from hybrid_runtime.store.beside import store_digest
from hybrid_runtime.store.predictor_files import read_header, read_layer
from hybrid_tools.predictor_training.importing import import_powerinfer
from hybrid_tools.predictor_training.ranks import layer_bytes
from hybrid_tools.predictor_training.run import LOCK

Q8 = RowFormat("q8", 32)


def powerinfer(folder, ranks=(6, 9)):
    folder.mkdir()
    for layer_idx, rank in enumerate(ranks):
        state = {"fc1.weight": torch.randn(rank, 32), "fc2.weight": torch.randn(48, rank)}
        torch.save(state, folder / f"model_{layer_idx}.pt")
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK}


def test_weights_are_the_files_and_the_header_says_what_they_are(dense, tmp_path):
    source, store = powerinfer(tmp_path / "source"), dense.opened.store
    header = import_powerinfer(store, source, tmp_path / "predictors", Q8)
    assert header == read_header(tmp_path / "predictors", dense.config, store_digest(store))
    assert (header.input, header.has_relu, header.row_format) == ("pre_norm", True, Q8)
    assert [layer.num_bytes for layer in header.layers] == [layer_bytes(dense.config, Q8, rank) for rank in (6, 9)]
    for layer_idx, layer in enumerate(header.layers):
        state = torch.load(source / f"model_{layer_idx}.pt", weights_only=True)
        ((fc1, fc2),) = read_layer(tmp_path / "predictors" / header.data, dense.config, layer_idx, layer.rank)
        assert torch.equal(fc1, state["fc1.weight"].bfloat16())
        assert torch.equal(fc2, state["fc2.weight"].bfloat16())


def test_others_take_the_place_of_those_before(dense, tmp_path):
    folder = tmp_path / "predictors"
    first = import_powerinfer(dense.opened.store, powerinfer(tmp_path / "first"), folder, Q8)
    second = import_powerinfer(dense.opened.store, powerinfer(tmp_path / "second", (3, 4)), folder, Q8)
    assert first.data != second.data
    assert [path.name for path in folder.glob("data-*")] == [second.data]


def test_a_bad_file_leaves_those_before(dense, tmp_path):
    folder = tmp_path / "predictors"
    header = import_powerinfer(dense.opened.store, powerinfer(tmp_path / "good"), folder, Q8)
    before = contents(folder)
    bad = powerinfer(tmp_path / "bad")
    torch.save({"fc1.weight": torch.ones(2, 9), "fc2.weight": torch.ones(48, 2)}, bad / "model_1.pt")
    with pytest.raises(CheckpointError, match=r"model_1\.pt: fc1 is \(2, 9\).*expected \(rank, 32\)"):
        import_powerinfer(dense.opened.store, bad, folder, Q8)
    now = contents(folder)
    assert {path: now[path] for path in before} == before
    assert read_header(folder, dense.config) == header


def test_two_at_a_time_are_refused(dense, tmp_path):
    folder = tmp_path / "predictors"
    folder.mkdir()
    source = powerinfer(tmp_path / "source")
    with filelock.FileLock(folder / LOCK), pytest.raises(UsageError, match=rf"{folder}: another run .*; wait for it"):
        import_powerinfer(dense.opened.store, source, folder, Q8)
