"""Predictors from files into a model's weights: the same numbers, an fc1 that all share held once."""

from dataclasses import replace

import pytest
import torch

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_predictors.study import RandomPredictor
from hybrid_runtime.errors import CheckpointError
from hybrid_runtime.model.trained_predictors import load_predictors, pack_layer, with_predictors
from hybrid_runtime.model.weights import DecoderLayer, DecoderWeights, FeedForward
from hybrid_runtime.store.predictor_files import (
    FORMAT_NAME,
    FORMAT_VERSION,
    LayerPredictors,
    PredictorHeader,
    layer_path,
    write_layer,
)

from ..placement.made_up import mixture_of  # noqa: TID252  # absolute names are the runtime's

CONFIG = mixture_of(num_hidden_layers=2)
HIDDEN, NEURONS, EXPERTS = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.num_experts
F32 = RowFormat("f32")
RANKS = (5, 40)


def header_of(row_format=F32):
    layers = tuple(LayerPredictors(rank, 0.25 * idx, 0) for idx, rank in enumerate(RANKS))
    return PredictorHeader(
        FORMAT_NAME, FORMAT_VERSION, "m", "0" * 64, "test", "post_norm", True, row_format.kind, row_format.group,
        layers, None, None, f"data-{'0' * 16}",
    )  # fmt: skip


@pytest.fixture
def written(tmp_path):
    """By layer the shared fc1 and every expert's fc2, as files hold them."""
    (tmp_path / header_of().data).mkdir()
    layers = []
    for layer_idx, rank in enumerate(RANKS):
        fc1, fc2 = torch.randn(rank, HIDDEN), torch.randn(EXPERTS, NEURONS, rank)
        write_layer(tmp_path / header_of().data, CONFIG, layer_idx, [(fc1, each) for each in fc2])
        layers.append((fc1.bfloat16().float(), fc2.bfloat16().float()))
    return layers


def test_loaded_predictors_compute_what_the_files_say(tmp_path, written, lone_team):
    x = torch.randn(3, HIDDEN)
    loaded = load_predictors(tmp_path, header_of(), CONFIG)
    for layer_idx, (of_layer, (fc1, fc2)) in enumerate(zip(loaded, written, strict=True)):
        assert len(of_layer) == EXPERTS
        for predictor, each in zip(of_layer, fc2, strict=True):
            expected = torch.relu(x @ fc1.T) @ each.T
            torch.testing.assert_close(predictor.logits(x, lone_team), expected, atol=1e-4, rtol=1e-4)
            assert predictor.threshold == 0.25 * layer_idx
    assert loaded[0][0].fc1.row_format == F32
    assert load_predictors(tmp_path, header_of(RowFormat("q4", 32)), CONFIG)[0][0].fc1.row_format == RowFormat("q4", 32)


def test_only_an_fc1_that_all_have_is_held_once():
    fc1, fc2 = torch.randn(4, HIDDEN), torch.randn(NEURONS, 4)
    same = pack_layer([(fc1, fc2), (fc1.clone(), fc2)], F32, 0.0, has_relu=True)
    assert same[0].fc1 is same[1].fc1
    other = pack_layer([(fc1, fc2), (fc1 + 1, fc2)], F32, 0.5, has_relu=False)
    assert other[0].fc1 is not other[1].fc1
    assert [(each.threshold, each.has_relu) for each in other] == [(0.5, False)] * 2


@pytest.mark.parametrize("what", ["missing", "rank"])
def test_files_that_do_not_fit_the_header_are_refused_by_name(tmp_path, written, what):
    header = header_of()
    path = layer_path(tmp_path / header.data, 1)
    if what == "missing":
        path.unlink()
    else:
        header = replace(header, layers=(header.layers[0], replace(header.layers[1], rank=41)))
    with pytest.raises(CheckpointError, match=r"layer-00001\.safetensors.*run hybrid-predictors train again") as error:
        load_predictors(tmp_path, header, CONFIG)
    if what == "rank":
        assert "40" in str(error.value)
        assert "41" in str(error.value)


def test_predictors_take_their_places_and_nothing_else_changes():
    own = tuple(FeedForward(object(), None) for _ in range(4))
    layer = DecoderLayer(*(object() for _ in range(7)), experts=own)
    weights = DecoderWeights(object(), None, (layer,), object(), object())
    predictors = [RandomPredictor(3, seed) for seed in range(4)]
    changed = with_predictors(weights, [predictors])
    assert [ffn.predictor for ffn in changed.layers[0].experts] == predictors
    assert [ffn.bundles for ffn in changed.layers[0].experts] == [ffn.bundles for ffn in own]
    assert replace(changed.layers[0], experts=own) == layer
    assert replace(changed, layers=(layer,)) == weights
    assert all(ffn.predictor is None for ffn in own)
    with pytest.raises(ValueError, match="shorter"):
        with_predictors(weights, [predictors[:3]])
