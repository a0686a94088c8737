"""Bamboo: Mistral's shape with dReLU. With an embedded predictor it is TurboSparse-Mistral, without one Bamboo-7B.

The predictor reads the residual stream *before* the FFN's norm (checkpoints.md §1.3): feeding it the normed input, as
TurboSparse-Mixtral does, silently destroys the output.
"""

from __future__ import annotations

from hybrid_kernels.activation import Activation
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.families.family import DENSE_RENAMES, Family, every_layer_window, parse_llama_like
from hybrid_runtime.families.raw_config import RawConfig


def _parse(raw: RawConfig, activation: Activation) -> ModelConfig:
    return parse_llama_like(
        raw, activation, "bamboo", sliding_windows=every_layer_window(raw), predictor_input="pre_norm"
    )


BAMBOO = Family("bamboo", ("bamboo",), _parse, DENSE_RENAMES)
