"""Which instructions kernels are generated for: found out once from the processor, shown by -v, overridable for tests.

avx512vnni, avxvnni   vpdpbusd: four products of bytes and their sum in one instruction
avx2                  vpmaddubsw and vpmaddwd
neon-dotprod          sdot
portable              generic vectors, which LLVM lowers to what there is
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import Literal, get_args

InstructionSet = Literal["avx512vnni", "avxvnni", "avx2", "neon-dotprod", "portable"]
INSTRUCTION_SETS: tuple[InstructionSet, ...] = get_args(InstructionSet)
VARIABLE = "HYBRID_INSTRUCTION_SET"


def choose_instruction_set(features: Mapping[str, bool]) -> InstructionSet:
    """The best that a processor with these LLVM features has."""
    if features.get("avx512vnni") and features.get("avx512vl"):
        return "avx512vnni"
    if features.get("avxvnni") and features.get("avx2"):
        return "avxvnni"
    if features.get("avx2") and features.get("fma") and features.get("f16c"):
        return "avx2"
    if features.get("dotprod"):
        return "neon-dotprod"
    return "portable"


@cache
def instruction_set() -> InstructionSet:
    """What this process's kernels use; the environment's HYBRID_INSTRUCTION_SET may ask for another.

    Raises ValueError for a name that is none, or that this processor does not have.
    """
    import llvmlite.binding as llvm  # noqa: PLC0415  # a native library, loaded where it is needed

    features = llvm.get_host_cpu_features()
    best = choose_instruction_set(features)
    wanted = os.environ.get(VARIABLE, best)
    if wanted not in INSTRUCTION_SETS:
        raise ValueError(f"{VARIABLE}={wanted}: is not one of {', '.join(INSTRUCTION_SETS)}")
    usable = {best, "portable"} | ({"avx2"} if all(features.get(name) for name in ("avx2", "fma", "f16c")) else set())
    if wanted not in usable:
        raise ValueError(f"{VARIABLE}={wanted}: this processor has only {', '.join(sorted(usable))}")
    return wanted
