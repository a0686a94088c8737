"""The numbers that GGUF files give tensor types, and the names this package uses for them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

PLAIN_MAGIC = "GGUF"
POWERINFER_MAGIC = "PWRI"

READABLE_TYPES: Mapping[int, str] = MappingProxyType(
    {
        0: "F32",
        1: "F16",
        2: "Q4_0",
        3: "Q4_1",
        6: "Q5_0",
        7: "Q5_1",
        8: "Q8_0",
        10: "Q2_K",
        11: "Q3_K",
        12: "Q4_K",
        13: "Q5_K",
        14: "Q6_K",
        24: "I8",
        25: "I16",
        26: "I32",
        27: "I64",
        28: "F64",
        30: "BF16",
    }
)

# Numbered in llama.cpp, not read here; listed so that the refusal can call them by name.
OTHER_TYPES: Mapping[int, str] = MappingProxyType(
    {
        4: "Q4_2 (withdrawn in 2023)",
        5: "Q4_3 (withdrawn in 2023)",
        9: "Q8_1",
        15: "Q8_K",
        16: "IQ2_XXS",
        17: "IQ2_XS",
        18: "IQ3_XXS",
        19: "IQ1_S",
        20: "IQ4_NL",
        21: "IQ3_S",
        22: "IQ2_S",
        23: "IQ4_XS",
        29: "IQ1_M",
        31: "Q4_0_4_4 (withdrawn in 2024)",
        32: "Q4_0_4_8 (withdrawn in 2024)",
        33: "Q4_0_8_8 (withdrawn in 2024)",
        34: "TQ1_0",
        35: "TQ2_0",
        39: "MXFP4",
        40: "NVFP4",
        41: "Q1_0",
    }
)

# PowerInfer branched off before llama.cpp gave 16 to 18 to the IQ types; its placement index stores int32 as 18.
POWERINFER_TYPES: Mapping[int, str] = MappingProxyType({16: "I8", 17: "I16", 18: "I32"})


def readable_type(number: int, magic: str) -> str | None:
    """The name of a tensor type that this runtime reads, or None."""
    if magic == POWERINFER_MAGIC and number in POWERINFER_TYPES:
        return POWERINFER_TYPES[number]
    return READABLE_TYPES.get(number)


def type_in_words(number: int) -> str:
    """An unreadable type for a message: its name where it has one, and its number."""
    return f"{OTHER_TYPES.get(number, 'unknown')} (ggml type {number})"
