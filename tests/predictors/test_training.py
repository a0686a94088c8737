"""Training: what can be learned is learned, the same way twice, and packing changes nothing any more."""

import math

import numpy as np
import pytest
import torch

from hybrid_kernels.quantization.op import dequantize_rows, quantize_rows
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_predictors.training import LayerSample, TrainingOptions, layer_curve, train_layer

HIDDEN, NEURONS, EXPERTS, RANK = 32, 40, 3, 16
Q4, Q8, F32 = RowFormat("q4", 32), RowFormat("q8", 32), RowFormat("f32")


def planted(num_tokens, chosen=2, seed=0) -> LayerSample:
    """Neurons that fire where rank-4 functions of the input are high, so that rank 16 can tell."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    directions = torch.randn(4, HIDDEN, generator=fixed)
    mixing = torch.randn(EXPERTS, NEURONS, 4, generator=fixed)
    inputs = torch.randn(num_tokens, HIDDEN, generator=generator)
    experts = torch.rand(num_tokens, EXPERTS, generator=generator).argsort(1)[:, :chosen].sort(1).values
    values = torch.einsum("nr,nkir->nki", inputs @ directions.T, mixing[experts])  # [n, k, I]
    active = values > 1.3 * values.std()
    packed = np.packbits(active.numpy(), axis=2, bitorder="little")
    return LayerSample(inputs.half(), experts.short(), torch.from_numpy(packed), NEURONS, EXPERTS)


def options(**differences) -> TrainingOptions:
    return TrainingOptions(**{"rank": RANK, "row_format": Q8, "num_epochs": 12, "batch_size": 64} | differences)


def test_active_sets_are_unpacked_as_they_were_packed():
    sample = planted(50)
    seen = 0
    for expert_idx, tokens, active in sample.of_experts():
        assert active.shape == (len(tokens), NEURONS)
        for token, row in zip(tokens.tolist(), active, strict=True):
            slot = sample.experts[token].tolist().index(expert_idx)
            bits = np.unpackbits(sample.active[token, slot].numpy(), bitorder="little")[:NEURONS]
            assert row.tolist() == [bool(bit) for bit in bits]
            seen += 1
    assert seen == 100


def test_split_takes_every_token_once_and_no_more_validation_than_is_used():
    sample = planted(100)
    training, validation = sample.split(0.1)
    assert (len(training), len(validation)) == (90, 10)
    assert torch.equal(torch.cat([training.inputs, validation.inputs]), sample.inputs)


@pytest.mark.parametrize("row_format", [F32, Q8, Q4], ids=str)
def test_what_can_be_told_is_learned(row_format):
    training, validation = planted(20_000).split(0.1)
    trained = train_layer(training, validation, options(row_format=row_format, batch_size=256, learning_rate=1e-2))
    # knowing nothing, 97 % of the neurons would have to be named to find 97 %: ten for one that fires
    assert trained.cost < (2.1 if row_format == Q4 else 2.0)
    unseen = planted(500, seed=5)
    reached = layer_curve(unseen, trained.fc1, trained.fc2, has_relu=True)
    assert reached.at(reached.for_recall(0.97)).density_ratio < trained.cost * 1.25


def test_same_seed_gives_the_same_weights_and_another_seed_others():
    training, validation = planted(300).split(0.2)
    first, again, other = (train_layer(training, validation, options(num_epochs=2, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first.fc1, again.fc1)
    assert torch.equal(first.fc2, again.fc2)
    assert not torch.equal(first.fc1, other.fc1)


@pytest.mark.parametrize("row_format", [Q8, Q4], ids=str)
def test_packing_finds_the_levels_again_that_training_ended_on(row_format):
    training, validation = planted(300).split(0.2)
    trained = train_layer(training, validation, options(num_epochs=2, row_format=row_format))
    for matrix in (trained.fc1, *trained.fc2):
        stored = matrix.bfloat16()
        restored = dequantize_rows(quantize_rows(stored, row_format), matrix.shape[1], row_format)
        # bfloat16 moves a value by 2**-9 of itself, and the largest one all levels with it
        assert (restored - matrix).abs().max() <= 1.5 * 2**-8 * matrix.abs().max()


def test_linear_kind_has_no_nonlinearity():
    sample = planted(200)
    fc1, fc2 = torch.randn(RANK, HIDDEN), torch.randn(EXPERTS, NEURONS, RANK)
    linear = layer_curve(sample, fc1, fc2, has_relu=False)
    mirrored = layer_curve(sample, -fc1, -fc2, has_relu=False)
    assert torch.equal(linear.named, mirrored.named)  # two signs cancel where nothing is cut off
    bent = layer_curve(sample, fc1, fc2, has_relu=True)
    assert not torch.equal(bent.named, layer_curve(sample, -fc1, -fc2, has_relu=True).named)


def test_layer_in_which_nothing_fires_gets_logits_of_zero():
    sample = planted(50)
    silent = LayerSample(sample.inputs, sample.experts, torch.zeros_like(sample.active), NEURONS, EXPERTS)
    trained = train_layer(silent, silent, options())
    assert math.isnan(trained.cost)
    assert not trained.fc2.any()


def test_expert_that_got_no_token_is_left_as_it_began():
    sample = planted(200)
    only = sample.take((sample.experts != 2).all(1))
    trained = train_layer(only, only, options(num_epochs=1))
    assert torch.isfinite(trained.fc2).all()


def test_empty_sample_is_refused():
    with pytest.raises(ValueError, match="no token to train on"):
        train_layer(planted(10).take(slice(0, 0)), planted(10), options())


def test_epochs_are_reported_and_the_best_one_counts():
    training, validation = planted(400).split(0.2)
    seen = []
    trained = train_layer(training, validation, options(num_epochs=6), lambda *epoch: seen.append(epoch))
    assert [epoch for epoch, _ in seen] == list(range(1, len(seen) + 1))
    assert trained.cost == min(cost for _, cost in seen)
    assert (trained.num_epochs, trained.cost) in seen
