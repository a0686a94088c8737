"""RMSNorm and LayerNorm on a GPU."""

from __future__ import annotations

import torch
import triton

from hybrid_kernels.norm.gpu_kernels import norm_kernel


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x: [T, H] float32, contiguous; weight: [H] -> [T, H]."""
    return _norm(x, weight, None, eps)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """x: [T, H] float32, contiguous; weight, bias: [H] -> [T, H]."""
    return _norm(x, weight, bias, eps)


def _norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    y = torch.empty_like(x)
    if len(x):
        width = x.shape[1]
        norm_kernel[(len(x),)](
            x,
            weight,
            weight if bias is None else bias,
            y,
            eps,
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            IS_RMS=bias is None,
        )
    return y
