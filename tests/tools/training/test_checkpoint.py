"""Saved states: the newest are kept, what was being written never counts."""

import pytest
import torch

from hybrid_runtime.errors import CheckpointError
from hybrid_runtime.tensor_files import write_tensors
from hybrid_tools.training.checkpoint import MOMENTS, State, list_states, load_state, save_state


def state(num_steps):
    weights = {"norm": torch.full((3,), float(num_steps)), "layers.0.mlp.up_proj": torch.randn(4, 3)}
    return State(num_steps, weights, {moment: {name: torch.randn(2) for name in weights} for moment in MOMENTS})


def test_what_was_saved_is_read_back(tmp_path):
    saved = state(7)
    path = save_state(tmp_path / "checkpoints", saved)
    assert path.name == "step-00000007.safetensors"
    found = load_state(path)
    assert found.num_steps == 7
    for name, weight in saved.weights.items():
        assert torch.equal(found.weights[name], weight)
        for moment in MOMENTS:
            assert torch.equal(found.moments[moment][name], saved.moments[moment][name])


def test_the_newest_two_are_kept_by_number(tmp_path):
    for num_steps in (2, 9, 10, 100):
        save_state(tmp_path, state(num_steps))
    assert [steps for steps, _ in list_states(tmp_path)] == [10, 100]


def test_half_written_files_do_not_count(tmp_path):
    save_state(tmp_path, state(1))
    (tmp_path / "step-00000002.safetensors.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("x")
    assert [steps for steps, _ in list_states(tmp_path)] == [1]
    assert list_states(tmp_path / "nowhere") == []


def test_files_of_something_else_are_refused(tmp_path):
    path = tmp_path / "step-00000001.safetensors"
    write_tensors(path, {"model.norm.weight": torch.ones(2)}, {})
    with pytest.raises(CheckpointError, match="is no checkpoint of hybrid-train"):
        load_state(path)
