"""A step: what the penalties do, what is decayed, what is counted."""

import numpy as np
import pytest
import torch

from hybrid_tools.training.initial import random_weights
from hybrid_tools.training.recipe import Optimisation, Shape, activation_of
from hybrid_tools.training.run_log import read_log
from hybrid_tools.training.trainer import HiddenSums, Trainer

from .tiny_runs import SIZES, train

VOCABULARY = 50


class SameBatch:
    def step(self, step_idx):
        return np.random.default_rng(1).integers(0, VOCABULARY, (4, 17)).astype("uint32")


def trainer(**options):
    shape = Shape(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
    )
    config = shape.config(activation_of("drelu", 0.0), VOCABULARY, 1, 2)
    settings = {"total_tokens": 40 * 64, "batch_tokens": 64, "seq_len": 16, "micro_batch": 4, "warmup": 0.0} | options
    return Trainer(config, random_weights(config, 1), Optimisation(**settings), SameBatch(), torch.device("cpu"))


def test_penalty_makes_hidden_vectors_sparser_and_smaller():
    free, pressed = trainer(), trainer(l1=1.0, l1_start=0.0, l1_end=0.0)
    for _ in range(30):
        without, with_penalty = free.step(), pressed.step()
    assert with_penalty.zeros > without.zeros + 0.1
    assert with_penalty.l1_weight == 1.0
    assert without.l1 == 0.0  # not even computed
    assert with_penalty.l1 < 0.1 * trainer(l1=1.0, l1_start=0.0, l1_end=0.0).step().l1


def test_balance_pulls_routing_towards_even():
    pulled, free = trainer(balance=1.0), trainer(balance=0.0)
    for _ in range(30):
        results = pulled.step(), free.step()
    assert results[0].balance < results[1].balance
    assert results[0].balance == pytest.approx(2.0, abs=0.05)  # k = 2 of evenly used experts


def test_norms_do_not_decay_and_matrices_do():
    still = trainer(learning_rate=1e-3, weight_decay=100.0)
    before = {name: weight.detach().clone() for name, weight in still.weights.items()}
    still.step()
    for name, weight in still.weights.items():
        moved = (weight.detach() - before[name]).abs().max()
        if weight.ndim == 1:
            assert moved <= 1.1e-3, name  # one step of Adam
        else:
            assert torch.allclose(weight.detach(), before[name] * 0.9, atol=1.2e-3), name


def test_micro_batches_add_up_to_the_batch():
    whole, parts = trainer(micro_batch=4, balance=0.0), trainer(micro_batch=1, balance=0.0)
    for _ in range(3):
        first, second = whole.step(), parts.step()
        assert first.loss == pytest.approx(second.loss, abs=1e-4)
        assert first.gradient_norm == pytest.approx(second.gradient_norm, rel=1e-3)


def test_bf16_products_learn_nearly_the_same():
    exact, rounded = trainer(), trainer(dtype="bf16")
    for _ in range(10):
        first, second = exact.step(), rounded.step()
    assert first.loss != second.loss
    assert first.loss == pytest.approx(second.loss, abs=0.1)
    assert all(weight.dtype == torch.float32 for weight in rounded.weights.values())


def test_sums_over_hidden_vectors_are_means_over_their_rows():
    sums = HiddenSums(keeps_norms=True)
    sums(0, 0, torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
    sums(0, 1, torch.tensor([[0.0, 3.0]]))
    assert sums.zero_share == 0.5
    assert float(sums.mean_norm) == 2.0
    assert HiddenSums(keeps_norms=False).mean_norm is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_gpu_trains_as_the_cpu_does(dtype, text, tmp_path):
    """Losses agree to what the order of sums (f32) or the numbers (bf16) explain."""
    options = ("--activation=drelu", "--l1=0.01", "--save-every=5", f"--dtype={dtype}")
    on_gpu = [each for each in SIZES if each != "--device=cpu"]
    assert train(text, tmp_path / "cpu", *options) == 0
    assert train(text, tmp_path / "gpu", *options, "--device=cuda", sizes=on_gpu) == 0
    losses = [
        [line["loss"] for line in read_log(tmp_path / run / "log.jsonl") if "loss" in line] for run in ("cpu", "gpu")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3 if dtype == "f32" else 0.05)
