"""A model's norms, of whichever kind its family has."""

from __future__ import annotations

import torch

from hybrid_kernels.norm.op import layer_norm, rms_norm
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.model.weights import Norm


def apply_norm(config: ModelConfig, norm: Norm, x: torch.Tensor) -> torch.Tensor:
    """x: [..., H] float32 -> the same shape."""
    if config.norm == "rms":
        return rms_norm(x, norm.weight, config.norm_eps)
    assert norm.bias is not None
    return layer_norm(x, norm.weight, norm.bias, config.norm_eps)
