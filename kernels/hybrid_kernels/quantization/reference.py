"""Quantising and dequantising rows in plain torch: the definition that every faster twin is held to.

q4 is fitted by least squares: rounding to the extreme value wastes the range on one outlier, so several scales are
tried for each group, each is replaced by the optimal one for its own rounding (`<w, q> / <q, q>`), and the pair with
the least squared error is kept. The signs of the scale are both tried, because the nibbles reach from -8 to +7.
"""

from __future__ import annotations

import torch

from hybrid_kernels.quantization.row_format import RowFormat

# The group's extreme value is put at one of these levels before the scale is refined.
Q4_EXTREME_LEVELS = (-8.6, -8.0, -7.4, -6.8, -6.2, -5.6, 7.5, 7.0, 6.4, 5.8)
Q4_REFINEMENTS = 2
LARGEST_SCALE = 65504.0  # of float16


def quantize_rows(weights: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    """weights: [N, K] float32 or bfloat16, finite -> uint8 [N, row_bytes].

    Raises ValueError where a group's scale would not be finite in float16.
    """
    if not row_format.is_quantized:
        num_rows, columns = weights.shape
        rows = torch.zeros(num_rows, row_format.row_bytes(columns), dtype=torch.uint8)
        dtype = torch.float32 if row_format.kind == "f32" else torch.bfloat16
        rows[:, : row_format.value_bytes(columns)] = weights.to(dtype).contiguous().view(torch.uint8)
        return rows
    groups = grouped_columns(weights.float(), row_format)  # [N, groups, G]
    scales, levels = _fit_q8(groups) if row_format.kind == "q8" else _fit_q4(groups)
    return write_rows(levels, scales, row_format)


def write_rows(levels: torch.Tensor, scales: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    """levels: [N, groups, G], whole numbers in the kind's range; scales: float16 [N, groups] -> [N, row_bytes]."""
    num_rows, num_groups, group = levels.shape
    columns = num_groups * group
    packed = levels.to(torch.int8).view(torch.uint8) if row_format.kind == "q8" else pack_nibbles(levels)
    rows = torch.zeros(num_rows, row_format.row_bytes(columns), dtype=torch.uint8)
    value_bytes = row_format.value_bytes(columns)
    rows[:, :value_bytes] = packed.reshape(num_rows, value_bytes)
    end = value_bytes + row_format.scale_bytes(columns)
    scales = scales.clone(memory_format=torch.contiguous_format)  # contiguous() leaves the strides of a single scale
    rows[:, value_bytes:end] = scales.view(torch.uint8).view(num_rows, end - value_bytes)
    return rows


def dequantize_rows(rows: torch.Tensor, columns: int, row_format: RowFormat) -> torch.Tensor:
    """rows: uint8 [N, row_bytes], the last dimension contiguous -> float32 [N, columns] (a view of f32 rows)."""
    if len(rows) == 0:  # a tier may hold no neuron, and torch does not reinterpret the bytes of empty tensors
        return torch.empty(0, columns)
    value_bytes = row_format.value_bytes(columns)
    values = rows[:, :value_bytes]
    if row_format.kind == "f32":
        return values.view(torch.float32)  # rows are aligned: no copy, even of one part of a bundle
    values = values.contiguous()
    if row_format.kind == "bf16":
        return values.view(torch.bfloat16).float()
    end = value_bytes + row_format.scale_bytes(columns)
    scales = rows[:, value_bytes:end].contiguous().view(torch.float16).float().unsqueeze(-1)  # [N, groups, 1]
    num_groups = scales.shape[1]
    if row_format.kind == "q8":
        levels = values.view(torch.int8).view(len(rows), num_groups, row_format.group).float()
    else:
        levels = unpack_nibbles(values.view(len(rows), num_groups, row_format.group // 2)).float()
    return (levels * scales).view(len(rows), num_groups * row_format.group)[:, :columns]


def grouped_columns(weights: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    """weights: [N, K] -> [N, groups, G], zero weights appended to the last group."""
    num_rows, columns = weights.shape
    padded = row_format.padded_columns(columns)
    groups = torch.nn.functional.pad(weights, (0, padded - columns))
    return groups.view(num_rows, padded // row_format.group, row_format.group)


def pack_nibbles(values: torch.Tensor) -> torch.Tensor:
    """values: [..., G] levels from -8 to 7 -> uint8 [..., G / 2] in the word order of row_format."""
    nibbles = (values.to(torch.int16) + 8).to(torch.uint8)
    group = values.shape[-1]
    planes = nibbles.view(*values.shape[:-1], 4, 2, group // 8)  # byte b of word j: nibbles 2b (low) and 2b + 1 (high)
    return (planes[..., 0, :] | (planes[..., 1, :] << 4)).transpose(-1, -2).reshape(*values.shape[:-1], group // 2)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """packed: uint8 [..., G / 2] -> int8 [..., G], levels from -8 to 7."""
    words = packed.view(*packed.shape[:-1], packed.shape[-1] // 4, 4).transpose(-1, -2)  # [..., 4 bytes, G / 8 words]
    planes = torch.stack((words & 0xF, words >> 4), dim=-2)  # [..., 4, 2, G / 8]
    return planes.reshape(*packed.shape[:-1], packed.shape[-1] * 2).to(torch.int8) - 8


def check_scale(largest: float) -> None:
    """Raise ValueError when float16 has no such scale."""
    if largest > LARGEST_SCALE:
        raise ValueError(f"a group's scale is {largest:.4g}, above float16's {LARGEST_SCALE:.0f}: use bf16 or f32 here")


def _fit_q8(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """groups: [N, groups, G] -> float16 scales [N, groups] and levels from -127 to 127."""
    scales = _half_precision(groups.abs().amax(dim=-1) / 127)
    return scales, _round_to_levels(groups, scales, -127, 127)


def _fit_q4(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """groups: [N, groups, G] -> float16 scales [N, groups] and levels from -8 to 7, least squares per group."""
    extremes = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    best_scale = torch.zeros_like(extremes)
    best_gain = torch.full_like(extremes, -1.0)
    for level in Q4_EXTREME_LEVELS:
        scale = extremes / level
        for _ in range(1 + Q4_REFINEMENTS):
            values = _round_to_levels(groups, scale, -8, 7)
            projection, energy = (groups * values).sum(-1), (values * values).sum(-1)
            scale = torch.where(energy > 0, projection / energy.clamp(min=1), 0)
        gain = projection * scale  # the squared error is <w, w> - gain
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, scale, best_scale)
    overflows = extremes.abs() > 8 * LARGEST_SCALE  # of the sums or of float16: either way the scale must say so
    best_scale = torch.where(overflows, extremes / 8, best_scale)
    scales = _half_precision(best_scale)
    return scales, _round_to_levels(groups, scales, -8, 7)


def _round_to_levels(groups: torch.Tensor, scales: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
    """Nearest level of each weight; a group whose scale is zero gets zero levels."""
    divisor = scales.float().unsqueeze(-1)
    levels = torch.where(divisor == 0, 0, groups / torch.where(divisor == 0, 1, divisor))
    return levels.round().clamp(lowest, highest)


def _half_precision(scales: torch.Tensor) -> torch.Tensor:
    check_scale(scales.abs().max().item() if scales.numel() else 0.0)
    return scales.to(torch.float16)
