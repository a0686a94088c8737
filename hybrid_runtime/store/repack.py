"""GGUF's Q4_0 and Q8_0 rows into our layout without loss: the levels and scales stay, only their order changes.

Quantising such a row again from its float values would find nearly, not exactly, the same numbers.
"""

from __future__ import annotations

import torch

from hybrid_kernels.quantization.reference import write_rows
from hybrid_kernels.quantization.row_format import RowFormat

BLOCK = 32  # weights that share a scale in both types
_BLOCK_BYTES = {"Q4_0": 18, "Q8_0": 34}


def can_repack(dtype: str, columns: int, row_format: RowFormat) -> bool:
    """Whether every level of this GGUF type fits row_format with the same groups."""
    if row_format.group != BLOCK or columns % BLOCK:
        return False
    return dtype == "Q4_0" or (dtype == "Q8_0" and row_format.kind == "q8")


def repack_rows(raw: torch.Tensor, dtype: str, row_format: RowFormat) -> torch.Tensor:
    """raw: uint8 [N, bytes of a GGUF row], a pair that can_repack allows -> uint8 [N, row_bytes]."""
    blocks = raw.view(len(raw), -1, _BLOCK_BYTES[dtype])  # [N, groups, 2 + values]
    scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    values = blocks[..., 2:]
    if dtype == "Q8_0":
        levels = values.contiguous().view(torch.int8)
    else:  # byte j holds element j low and element j + 16 high
        levels = torch.cat((values & 0xF, values >> 4), dim=-1).to(torch.int8) - 8
    return write_rows(levels, scales, row_format)
