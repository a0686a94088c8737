"""Qwen2: Llama with biases on q, k and v. SparseQwen2 computes dReLU although stock Qwen2 code would not."""

from __future__ import annotations

from hybrid_kernels.activation import Activation
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.families.family import DENSE_RENAMES, Family, one_window, parse_llama_like
from hybrid_runtime.families.raw_config import RawConfig


def _parse(raw: RawConfig, activation: Activation) -> ModelConfig:
    return parse_llama_like(raw, activation, "qwen2", qkv_bias=True, sliding_windows=_windows(raw))


def _windows(raw: RawConfig) -> tuple[int | None, ...]:
    """Qwen2 slides only where `use_sliding_window` says so, in `layer_types` or from layer `max_window_layers` on."""
    window = one_window(raw, 4096)
    if window is None or not raw.boolean("use_sliding_window", default=False):
        return ()
    num_layers = raw.integer("num_hidden_layers")
    types = raw.names("layer_types", num_layers, ("full_attention", "sliding_attention"))
    if types is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    first = raw.integer("max_window_layers", 28, minimum=0)
    return tuple(window if layer_idx >= first else None for layer_idx in range(num_layers))


QWEN2 = Family("qwen2", ("qwen2",), _parse, DENSE_RENAMES, "silu")
