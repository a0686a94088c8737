"""Rotary position embedding: argument checks and dispatch (the reference is the only implementation so far)."""

from __future__ import annotations

import torch

from hybrid_kernels.rope import reference


def apply_rope(
    x: torch.Tensor, positions: torch.Tensor, inverse_frequencies: torch.Tensor, magnitude: float = 1.0
) -> torch.Tensor:
    """x: [T, heads, D] float32; positions: [T] int64; inverse_frequencies: [D / 2] -> [T, heads, D]."""
    if x.dim() != 3 or positions.shape != x.shape[:1] or inverse_frequencies.shape != (x.shape[-1] / 2,):
        raise ValueError(
            f"x {tuple(x.shape)}, positions {tuple(positions.shape)} and inverse_frequencies "
            f"{tuple(inverse_frequencies.shape)} do not fit [T, heads, D], [T], [D / 2]"
        )
    return reference.apply_rope(x, positions, inverse_frequencies, magnitude)
