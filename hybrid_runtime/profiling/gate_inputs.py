"""What neurons read, from a profile's sample of what predictors read: that may be the stream before the norm."""

from __future__ import annotations

import torch

from hybrid_runtime.model.norms import apply_norm
from hybrid_runtime.model.weights import Norm
from hybrid_runtime.store.reader import Store


def gate_inputs(store: Store, layer_idx: int, inputs: torch.Tensor) -> torch.Tensor | None:
    """inputs: float32 [n, H], as sampled -> [n, H]; None where predictors read the layer's input: attention lacks."""
    config = store.manifest.config
    if config.predictor_input in (None, "post_norm"):
        return inputs
    if config.predictor_input == "layer_input":
        return None
    name = f"layers.{layer_idx}.post_attention_layernorm"
    weight = store.weight(name)
    bias = store.weight(f"{name}.bias") if config.norm == "layer" else None
    assert isinstance(weight, torch.Tensor)
    assert bias is None or isinstance(bias, torch.Tensor)
    return apply_norm(config, Norm(weight, bias), inputs)
