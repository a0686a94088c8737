"""Rotary position embedding (Su et al. 2021) in Hugging Face's half-split order: column d is paired with d + D/2."""

from __future__ import annotations

import torch


def apply_rope(
    x: torch.Tensor, positions: torch.Tensor, inverse_frequencies: torch.Tensor, magnitude: float = 1.0
) -> torch.Tensor:
    """x: [T, heads, D] float32; positions: [T] int64; inverse_frequencies: [D / 2] float32 -> [T, heads, D].

    magnitude multiplies the rotation, which scales attention scores by its square (yarn, longrope).
    """
    angles = positions.float().unsqueeze(1) * inverse_frequencies  # [T, D / 2]
    cos, sin = (angles.cos() * magnitude).unsqueeze(1), (angles.sin() * magnitude).unsqueeze(1)  # [T, 1, D / 2]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
