"""The element types that safetensors and GGUF files name alike, one number an element.

The block-quantised types of GGUF, where a scale is shared by 32 or 256 elements, are in `gguf_blocks.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch


@dataclass(frozen=True, slots=True)
class ElementType:
    """Size of one element, and the torch dtype that holds it; None where this runtime reads no such tensor."""

    num_bytes: int
    torch_dtype: torch.dtype | None


# The 8-bit floats and complex numbers are known, so that a file with a stray one opens, but they are not read: an 8-bit
# checkpoint keeps separate scales, and its weights without them would be silently wrong.
ELEMENT_TYPES: Mapping[str, ElementType] = MappingProxyType(
    {
        "BOOL": ElementType(1, torch.bool),
        "U8": ElementType(1, torch.uint8),
        "I8": ElementType(1, torch.int8),
        "F8_E5M2": ElementType(1, None),
        "F8_E4M3": ElementType(1, None),
        "F8_E8M0": ElementType(1, None),
        "U16": ElementType(2, torch.uint16),
        "I16": ElementType(2, torch.int16),
        "F16": ElementType(2, torch.float16),
        "BF16": ElementType(2, torch.bfloat16),
        "U32": ElementType(4, torch.uint32),
        "I32": ElementType(4, torch.int32),
        "F32": ElementType(4, torch.float32),
        "U64": ElementType(8, torch.uint64),
        "I64": ElementType(8, torch.int64),
        "F64": ElementType(8, torch.float64),
        "C64": ElementType(8, None),
    }
)

READABLE_ELEMENT_TYPES = tuple(name for name, kind in ELEMENT_TYPES.items() if kind.torch_dtype is not None)
