"""The block-quantised tensor types of GGUF: what a block's bytes mean, and their float32 values.

A block holds 32 or 256 consecutive elements of one row with their scales. Every function takes `blocks`, uint8
[N blocks, bytes per block], and returns float32 [N blocks, elements per block], bit-equal to the `gguf` package: the
multiplications round in the same order, and no product is fused with an addition. It is vectorised over blocks, so the
caller bounds memory by how many blocks it passes. Quantising is not done here, and neither is reading files.

Packed layouts, offsets in bytes (d, m: float16 scale and offset of the block):

    Q4_0   18  d, 16 x 2 nibbles                       Q2_K   84  16 scales|mins (4+4 bit), 64 x 4 crumbs, d, m
    Q4_1   20  d, m, 16 x 2 nibbles                    Q3_K  110  32 high bits, 64 x 4 crumbs, 12 scales (6 bit), d
    Q5_0   22  d, 4 high bits, 16 x 2 nibbles          Q4_K  144  d, m, 12 scales|mins (6 bit), 128 x 2 nibbles
    Q5_1   24  d, m, 4 high bits, 16 x 2 nibbles       Q5_K  176  d, m, 12 scales|mins, 32 high bits, 128 x 2 nibbles
    Q8_0   34  d, 32 int8                              Q6_K  210  128 x 2 nibbles, 64 x 4 crumbs, 16 int8 scales, d

A nibble pair holds element j low and element j + half a group high, not neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One block-quantised type: sizes, where its float16 scales lie, and how its values are computed."""

    num_elements: int
    num_bytes: int
    scale_offsets: tuple[int, ...]
    dequantize: Callable[[Tensor], Tensor]

    def scales(self, blocks: Tensor) -> Tensor:
        """blocks: [N, num_bytes] uint8 -> [N, number of scales] float16. A block's values are finite iff these are."""
        return torch.cat([_half(blocks, offset) for offset in self.scale_offsets], dim=1)


def _half(blocks: Tensor, offset: int) -> Tensor:
    return blocks[:, offset : offset + 2].view(torch.float16)  # [N, 1]


def _scale(blocks: Tensor, offset: int) -> Tensor:
    return _half(blocks, offset).float()  # [N, 1]


def _fields(packed: Tensor, bits: int, group: int) -> Tensor:
    """packed: [N, bytes] of 8/bits fields each -> [N, bytes/group, 8/bits, group], a group's low fields first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).view(1, 1, -1, 1)
    return (packed.reshape(len(packed), -1, 1, group) >> shifts) & ((1 << bits) - 1)


def _nibbles_32(packed: Tensor) -> Tensor:
    return _fields(packed, 4, 16).flatten(1)  # [N, 32]


def _fifth_bits_32(high: Tensor) -> Tensor:
    """high: [N, 4] uint8, one bit an element in order -> [N, 32] uint8 holding 0 or 16."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return (((high.unsqueeze(2) >> shifts) & 1) << 4).flatten(1)


def _dequantize_q4_0(blocks: Tensor) -> Tensor:
    return _nibbles_32(blocks[:, 2:]).float().sub_(8).mul_(_scale(blocks, 0))


def _dequantize_q4_1(blocks: Tensor) -> Tensor:
    return _nibbles_32(blocks[:, 4:]).float().mul_(_scale(blocks, 0)).add_(_scale(blocks, 2))


def _dequantize_q5_0(blocks: Tensor) -> Tensor:
    values = _nibbles_32(blocks[:, 6:]) | _fifth_bits_32(blocks[:, 2:6])
    return values.float().sub_(16).mul_(_scale(blocks, 0))


def _dequantize_q5_1(blocks: Tensor) -> Tensor:
    values = _nibbles_32(blocks[:, 8:]) | _fifth_bits_32(blocks[:, 4:8])
    return values.float().mul_(_scale(blocks, 0)).add_(_scale(blocks, 2))


def _dequantize_q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_scale(blocks, 0))


def _dequantize_q2_k(blocks: Tensor) -> Tensor:
    packed_scales = blocks[:, :16]
    scale = _scale(blocks, 80) * (packed_scales & 15)  # [N, 16]
    offset = _scale(blocks, 82) * (packed_scales >> 4)
    values = _fields(blocks[:, 16:80], 2, 32).reshape(-1, 16, 16).float()
    return values.mul_(scale.unsqueeze(2)).sub_(offset.unsqueeze(2)).flatten(1)


def _dequantize_q3_k(blocks: Tensor) -> Tensor:
    low = _fields(blocks[:, 96:104], 4, 8).flatten(1)  # [N, 16]: bits 0-3 of the scales
    high = _fields(blocks[:, 104:108], 2, 4).flatten(1)  # [N, 16]: bits 4-5
    scale = _scale(blocks, 108) * (low | (high << 4)).float().sub_(32)
    crumbs = _fields(blocks[:, 32:96], 2, 32).reshape(-1, 16, 16)
    third_bits = _fields(blocks[:, :32], 1, 32).reshape(-1, 16, 16)  # a clear bit means minus four
    values = (crumbs | (third_bits << 2)).float().sub_(4)
    return values.mul_(scale.unsqueeze(2)).flatten(1)


def _group_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets of the 8 groups of a Q4_K or Q5_K block, [N, 8, 1] each; 6-bit integers times d and m."""
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((low & 63, (high & 15) | ((low >> 2) & 48)), dim=1)
    offsets = torch.cat((middle & 63, (high >> 4) | ((middle >> 2) & 48)), dim=1)
    return (_scale(blocks, 0) * scales).unsqueeze(2), (_scale(blocks, 2) * offsets).unsqueeze(2)


def _dequantize_q4_k(blocks: Tensor) -> Tensor:
    scale, offset = _group_scales(blocks)
    values = _fields(blocks[:, 16:], 4, 32).reshape(-1, 8, 32).float()
    return values.mul_(scale).sub_(offset).flatten(1)


def _dequantize_q5_k(blocks: Tensor) -> Tensor:
    scale, offset = _group_scales(blocks)
    fifth_bits = _fields(blocks[:, 16:48], 1, 32).reshape(-1, 8, 32)
    values = _fields(blocks[:, 48:], 4, 32).reshape(-1, 8, 32) | (fifth_bits << 4)
    return values.float().mul_(scale).sub_(offset).flatten(1)


def _dequantize_q6_k(blocks: Tensor) -> Tensor:
    low = _fields(blocks[:, :128], 4, 64).reshape(-1, 8, 32)
    high = _fields(blocks[:, 128:192], 2, 32).reshape(-1, 8, 32)
    scale = _scale(blocks, 208) * blocks[:, 192:208].view(torch.int8)  # [N, 16]
    values = (low | (high << 4)).float().sub_(32).reshape(-1, 16, 16)
    return values.mul_(scale.unsqueeze(2)).flatten(1)


BLOCK_FORMATS: Mapping[str, BlockFormat] = MappingProxyType(
    {
        "Q4_0": BlockFormat(32, 18, (0,), _dequantize_q4_0),
        "Q4_1": BlockFormat(32, 20, (0, 2), _dequantize_q4_1),
        "Q5_0": BlockFormat(32, 22, (0,), _dequantize_q5_0),
        "Q5_1": BlockFormat(32, 24, (0, 2), _dequantize_q5_1),
        "Q8_0": BlockFormat(32, 34, (0,), _dequantize_q8_0),
        "Q2_K": BlockFormat(256, 84, (80, 82), _dequantize_q2_k),
        "Q3_K": BlockFormat(256, 110, (108,), _dequantize_q3_k),
        "Q4_K": BlockFormat(256, 144, (0, 2), _dequantize_q4_k),
        "Q5_K": BlockFormat(256, 176, (0, 2), _dequantize_q5_k),
        "Q6_K": BlockFormat(256, 210, (208,), _dequantize_q6_k),
    }
)
