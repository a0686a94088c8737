"""Mistral: Llama with a sliding window over all layers where config.json gives one."""

from __future__ import annotations

from hybrid_kernels.activation import Activation
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.families.family import DENSE_RENAMES, Family, every_layer_window, parse_llama_like
from hybrid_runtime.families.raw_config import RawConfig

DEFAULT_WINDOW = 4096  # transformers', where config.json has no such key; null there means none


def _parse(raw: RawConfig, activation: Activation) -> ModelConfig:
    return parse_llama_like(raw, activation, "mistral", sliding_windows=every_layer_window(raw, DEFAULT_WINDOW))


MISTRAL = Family("mistral", ("mistral",), _parse, DENSE_RENAMES, "silu")
