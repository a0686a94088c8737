"""Where training begins: random weights, the same for the same names whatever the activation, or a checkpoint's."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from hybrid_kernels.activation import Activation
from hybrid_runtime.checkpoints.checkpoint import Checkpoint
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.model.weight_specs import all_weights

STANDARD_DEVIATION = 0.02  # of every matrix, as GPT-2's


def random_weights(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Float32 by canonical name. Twins that differ in their activation alone begin with the very same numbers.

    What adds to the residual stream (o_proj, down_proj) is smaller by sqrt(2 layers), as in GPT-2.
    """
    residual = STANDARD_DEVIATION / math.sqrt(2 * config.num_hidden_layers)
    weights = {}
    for name, shape in _shapes(config):
        if len(shape) == 1:
            weights[name] = torch.ones(shape)
            continue
        deviation = residual if name.endswith(("o_proj", "down_proj")) else STANDARD_DEVIATION
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        weights[name] = torch.randn(shape, generator=generator) * deviation
    return weights


def checkpoint_weights(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The checkpoint's weights as float32. config: its own, with another activation or without predictors."""
    return {name: checkpoint.read(name).float().clone() for name, _ in _shapes(config)}


def with_activation(config: ModelConfig, activation: Activation) -> ModelConfig:
    """The same decoder with another activation: what relufication begins with.

    Predictors that a checkpoint carries say what fired before, so they are left behind.
    """
    return replace(
        without_predictor(config),
        activation=activation,
        family=family_of(activation, is_mixture=config.num_experts > 0),
    )


def without_predictor(config: ModelConfig) -> ModelConfig:
    """The decoder alone: training changes what fires, so a checkpoint's predictors would be wrong."""
    return replace(config, predictor_input=None, predictor_is_part_of_model=False)


def family_of(activation: Activation, *, is_mixture: bool) -> str:
    """The published family that computes it: TurboSparse-Mixtral's and Bamboo's names mean dReLU."""
    if activation.kind == "drelu":
        return "turbosparsemixtral" if is_mixture else "bamboo"
    return "mixtral" if is_mixture else "llama"


def _shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    for spec in all_weights(config):
        shape = tuple(size for size in spec.shape if size is not None)
        assert len(shape) == len(spec.shape), f"{spec.name} has no fixed size"  # only predictors' ranks are open
        yield spec.name, shape
