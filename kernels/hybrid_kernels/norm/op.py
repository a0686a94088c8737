"""RMSNorm and LayerNorm: argument checks and dispatch (the reference is the only implementation so far)."""

from __future__ import annotations

import torch

from hybrid_kernels.norm import reference


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x: [..., H] float32; weight: [H] -> [..., H]. Raises ValueError when the widths differ."""
    _check(x, weight)
    return reference.rms_norm(x, weight, eps)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """x: [..., H] float32; weight, bias: [H] -> [..., H]. Raises ValueError when the widths differ."""
    _check(x, weight)
    _check(x, bias)
    return reference.layer_norm(x, weight, bias, eps)


def _check(x: torch.Tensor, vector: torch.Tensor) -> None:
    if vector.shape != x.shape[-1:]:
        raise ValueError(f"a norm of width {tuple(vector.shape)} on x of shape {tuple(x.shape)}")
