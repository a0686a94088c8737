"""What gates read follows from what predictors read, by the layer's own norm."""

from dataclasses import replace

import pytest
import torch

from hybrid_runtime.model.weights import load_weights
from hybrid_runtime.profiling.gate_inputs import gate_inputs
from hybrid_runtime.store.manifest import read_manifest
from hybrid_runtime.store.reader import Store
from hybrid_tools.convert import main as convert

from ..small_models import write_pre_norm_model  # noqa: TID252  # absolute names are the runtime's


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    write_pre_norm_model(folder / "checkpoint")
    assert convert([str(folder / "checkpoint"), "-o", str(folder / "store")]) == 0
    return Store(folder / "store", read_manifest(folder / "store"))


def reading(store, predictor_input):
    config = replace(store.manifest.config, predictor_input=predictor_input)
    return Store(store.folder, replace(store.manifest, config=config))


@pytest.mark.parametrize("predictor_input", [None, "post_norm"])
def test_behind_the_norm_they_are_the_same(store, predictor_input):
    inputs = torch.randn(3, 32)
    assert gate_inputs(reading(store, predictor_input), 1, inputs) is inputs


def test_before_the_norm_it_is_applied(store):
    assert store.manifest.config.predictor_input == "pre_norm"
    inputs = 5 * torch.randn(3, 32)
    weight = load_weights(store).layers[1].post_attention_layernorm.weight
    expected = inputs / (inputs.square().mean(1, keepdim=True) + store.manifest.config.norm_eps).sqrt() * weight
    found = gate_inputs(store, 1, inputs)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, gate_inputs(store, 0, inputs))  # each layer has its own


def test_before_attention_nothing_can_be_said(store):
    assert gate_inputs(reading(store, "layer_input"), 1, torch.randn(3, 32)) is None
