"""Triton kernels compiled for GPUs that are not here, and what their machine code says of spills and instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 89, 90, 120)
DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)(.*);", re.MULTILINE)
LABEL = re.compile(r"^\s*(\.L\w+):", re.MULTILINE)
THREADS = 32


@dataclass(frozen=True)
class Machine:
    """opcodes: of the whole kernel; loops: opcodes of each innermost loop, the longest first."""

    opcodes: list[str]
    loops: list[list[str]]

    def count(self, prefix):
        return sum(opcode.startswith(prefix) for opcode in self.opcodes)

    def per_weight(self, weights, num_warps):
        """Instructions of all warps in the longest loop for a weight of one of its rounds, as a thread counts them."""
        return len(self.loops[0]) * num_warps * THREADS / weights


def compiled(kernel, signature, constants, architecture, **options) -> Machine:
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(idx,): [["tt.divisibility", 16]] for idx, name in enumerate(kernel.arg_names) if types[name][0] == "*"
               or name.endswith("_stride") or name.startswith("part_")}  # fmt: skip
    source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True} | options
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run([DISASSEMBLER, "-c", file.name], check=True, capture_output=True, text=True).stdout
    return _machine(text)


def _machine(text: str) -> Machine:
    """From nvdisasm's text: a loop is what lies between a label and a branch back to it, without another loop in it."""
    opcodes, spans, starts = [], [], {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            starts[label.group(1)] = len(opcodes)
        elif found := INSTRUCTION.match(line):
            opcode, rest = found.group(2), found.group(3)
            target = re.search(r"`\((\.L\w+)\)", rest)
            if opcode.startswith("BRA") and target and target.group(1) in starts:
                spans.append((starts[target.group(1)], len(opcodes) + 1))
            opcodes.append(opcode)
    spans = [each for each in spans if each[1] - each[0] > 1]
    inner = [each for each in spans if not any(_holds(each, other) for other in spans)]
    return Machine(opcodes, sorted((opcodes[first:last] for first, last in inner), key=len, reverse=True))


def _holds(span: tuple[int, int], other: tuple[int, int]) -> bool:
    return other != span and span[0] <= other[0] and other[1] <= span[1]
