"""Inverse frequencies of rotary positions, for every scaling variant that the families use.

default    theta^(-2d / D)
linear     divided by factor (Position Interpolation)
llama3     low frequencies divided by factor, a smooth step between two wavelengths (Llama 3.1)
yarn       low frequencies divided by factor, a linear ramp over dimensions, scaled magnitude (arXiv 2309.00071)
longrope   divided by one list of factors up to the trained length, by another beyond it (arXiv 2402.13753)
factors    divided by one list of factors, as GGUF stores a precomputed llama3 scaling (`rope_freqs.weight`)
"""

from __future__ import annotations

import math

import torch

from hybrid_runtime.config import RopeConfig
from hybrid_runtime.errors import CheckpointError


def rope_frequencies(rope: RopeConfig, head_dim: int, num_positions: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [D / 2] float32 for a sequence of num_positions so far, and the rotation's magnitude."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    match rope.kind:
        case "linear":
            return frequencies / rope.factor, 1.0
        case "llama3":
            return _llama3(rope, frequencies), 1.0
        case "yarn":
            return _yarn(rope, head_dim, frequencies)
        case "longrope":
            is_long = num_positions > rope.original_max_position_embeddings
            factors = _factors(rope.long_factor if is_long else rope.short_factor, frequencies, rope.kind)
            return frequencies / factors, _longrope_magnitude(rope)
        case "factors":
            return frequencies / _factors(rope.short_factor, frequencies, rope.kind), 1.0
        case _:
            return frequencies, 1.0


def _llama3(rope: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    wavelengths = 2 * math.pi / frequencies
    trained = rope.original_max_position_embeddings
    smooth = (trained / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    scaled = torch.where(wavelengths > trained / rope.low_freq_factor, frequencies / rope.factor, blended)
    return torch.where(wavelengths < trained / rope.high_freq_factor, frequencies, scaled)


def _yarn(rope: RopeConfig, head_dim: int, frequencies: torch.Tensor) -> tuple[torch.Tensor, float]:
    def dimension_of(rotations: float) -> float:
        """The dimension that turns this often over the trained length."""
        length = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)  # 1: interpolate
    magnitude = rope.attention_factor
    if magnitude is None:
        both = rope.mscale != 0 and rope.mscale_all_dim != 0
        magnitude = _yarn_magnitude(rope.factor, rope.mscale if both else 1.0)
        magnitude /= _yarn_magnitude(rope.factor, rope.mscale_all_dim) if both else 1.0
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp), magnitude


def _yarn_magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope_magnitude(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))


def _factors(factors: tuple[float, ...], frequencies: torch.Tensor, kind: str) -> torch.Tensor:
    if len(factors) != len(frequencies):
        raise CheckpointError(f"{kind} lists {len(factors)} factors, expected head_dim / 2 = {len(frequencies)}")
    return torch.tensor(factors, dtype=torch.float32)
