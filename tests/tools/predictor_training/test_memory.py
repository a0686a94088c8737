"""Training one layer stays below what was worked out before it begins."""

import json
import subprocess
import sys

import pytest
import torch

from hybrid_runtime.tensor_files import write_tensors
from hybrid_tools.predictor_training.memory import comparing_bytes, sample_row_bytes, training_bytes, validated_tokens
from tests.hybrid_runtime.placement.made_up import config_of, mixture_of

SHAPE = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "head_dim": 64}
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_predictors.training import LayerSample, TrainingOptions, train_layer
from hybrid_runtime.machine import current_rss_bytes, peak_rss_bytes, reset_peak_rss
from hybrid_runtime.tensor_files import read_tensors

path, num_samples, rank, neurons, slots, experts = json.loads(sys.argv[1])
path = Path(path)
torch.set_num_threads(1)
small = LayerSample(torch.randn(64, 256).half(), torch.zeros(64, 2).short(),
                    torch.randint(0, 255, (64, 2, 48), dtype=torch.uint8), 384, 4)
train_layer(small, small, TrainingOptions(32, RowFormat("q4", 32), num_epochs=1))  # torch has loaded what it needs
reset_peak_rss()
before = current_rss_bytes()
tensors = read_tensors(path, {
    "inputs": ((num_samples, 256), torch.float16),
    "experts": ((num_samples, slots), torch.int16),
    "active": ((num_samples, slots, neurons // 8), torch.uint8),
}, "remedy")
training, validation = LayerSample(**tensors, num_neurons=neurons, num_experts=experts).split(0.1)
train_layer(training, validation, TrainingOptions(rank, RowFormat("q4", 32), num_epochs=2, batch_size=512))
print(json.dumps(peak_rss_bytes() - before))
"""


@pytest.mark.parametrize(
    ("config", "num_samples", "rank"),
    [
        (mixture_of(**SHAPE), 60_000, 192),  # mostly the sample
        (config_of(**SHAPE | {"intermediate_size": 16384}), 10_000, 32),  # mostly what is validated, and batches
        (mixture_of(**SHAPE | {"intermediate_size": 8192}), 1000, 256),  # mostly weights
    ],
    ids=["sample", "neurons", "weights"],
)
def test_a_layers_training_stays_below_what_was_worked_out(tmp_path, config, num_samples, rank):
    slots, experts = max(1, config.num_experts_per_tok), max(1, config.num_experts)
    shape = num_samples, slots, config.intermediate_size // 8
    halves = [torch.randint(0, 255, shape, dtype=torch.uint8) for _ in range(2)]
    tensors = {
        "inputs": torch.randn(num_samples, config.hidden_size).half(),
        "experts": torch.rand(num_samples, experts).argsort(1)[:, :slots].short(),
        "active": halves[0] & halves[1],
    }
    write_tensors(tmp_path / "sample.safetensors", tensors, {})
    arguments = [str(tmp_path / "sample.safetensors"), num_samples, rank, config.intermediate_size, slots, experts]
    command = [sys.executable, "-c", PROGRAM, json.dumps(arguments)]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    promised = training_bytes(config, num_samples, rank, 0)
    assert int(run.stdout) <= promised
    assert int(run.stdout) > 0.4 * promised  # and it is no excuse


def test_a_sampled_tokens_bytes():
    config = mixture_of(**SHAPE)
    assert sample_row_bytes(config) == 256 * 2 + 2 * (2 + 48)
    assert validated_tokens(config, 1000) == 100
    assert validated_tokens(config, 10**9) == (1 << 24) // (2 * 384)


def test_wider_models_and_larger_samples_take_more():
    small, large = mixture_of(**SHAPE), mixture_of(**SHAPE | {"intermediate_size": 3840})
    assert training_bytes(small, 1000, 32, 0) < training_bytes(large, 1000, 32, 0) < training_bytes(large, 1000, 64, 0)
    assert training_bytes(small, 1000, 32, 10**9) == training_bytes(small, 1000, 32, 0) + 10**9
    assert comparing_bytes(small, 1000) < comparing_bytes(large, 1000) < comparing_bytes(large, 10**6)


def test_only_the_kinds_that_are_compared_take_memory():
    config = mixture_of(**SHAPE | {"intermediate_size": 3840})
    takes = {kind: comparing_bytes(config, 10**5, [kind]) for kind in ("sign", "svd", "oracle")}
    assert takes["sign"] > takes["svd"] > takes["oracle"]
    assert comparing_bytes(config, 10**5) == max(takes.values())
    assert comparing_bytes(config, 10**5, ["oracle", "svd"]) == takes["svd"]
