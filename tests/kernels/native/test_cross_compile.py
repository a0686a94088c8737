"""Kernels are generated for processors that this machine is not, and contain the instructions meant for them."""

import json
import os
import re
import subprocess
import sys

import pytest

from hybrid_kernels.native import load
from hybrid_kernels.native.emitted_format import FORMAT_VARIABLE
from hybrid_kernels.native.kernel_names import kernel
from hybrid_kernels.quantization.row_format import RowFormat

KERNELS = ("project", "run_neurons", "multiply_batch")
Q4 = kernel("project", RowFormat("q4", 32)).format_idx
X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
# instruction set: features that make it the best, triple, processor, what each of KERNELS must contain, and must not
TARGETS = {
    "avx512vnni": (["avx512vnni", "avx512vl"], X86, "icelake-server", ["vpdpbusd"] * 3, None),
    "avxvnni": (["avxvnni", "avx2"], X86, "alderlake", ["vpdpbusd"] * 3, "zmm"),
    "avx2": (["avx2", "fma", "f16c"], X86, "haswell", ["vpmaddubsw"] * 3, "vpdpbusd"),
    "neon-dotprod": (["dotprod"], ARM, "neoverse-n1", ["sdot"] * 3, None),
    "portable": ([], X86, "x86-64-v2", ["pmull|pmadd"] * 3, r"ymm|vpdpbusd|pmaddubsw"),
    "portable-arm": ([], ARM, "generic", [r"smull|mul\tv|mla\tv"] * 3, r"\bsdot"),
}

# A process whose processor claims to have those features. Numba generates code for the true one meanwhile, which cannot
# have the target's instructions: they are calls of unknown functions until its work is done.
PROGRAM = """
import json, sys
import llvmlite.binding as llvm
from hybrid_kernels.native.instruction_sets import instruction_set

features, triple, processor, names = json.loads(sys.argv[1])
real = llvm.get_host_cpu_features
llvm.get_host_cpu_features = lambda: dict.fromkeys(features, True)
chosen = instruction_set()  # remembered from here on
llvm.get_host_cpu_features = real

from hybrid_kernels.simd import emit, multiply_add, panels
call = emit.call

def call_later(builder, name, result, args):
    if name.startswith(("llvm.x86.", "llvm.aarch64.")):
        name = "later" + name
        llvm.add_symbol(name, 1)
    return call(builder, name, result, args)

emit.call = multiply_add.call = panels.call = call_later

from hybrid_kernels.native.build import Target, emit, kernel_function, kernel_ir
target, found = Target(triple, processor, ""), {}
for name in names:
    assembly, symbol = kernel_ir(kernel_function(name))
    found[name] = symbol, emit(assembly.replace("laterllvm.", "llvm."), target, as_text=True).decode()
print(json.dumps([chosen, found]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_are_made_of_the_targets_own_instructions(target):
    features, triple, processor, expected, unwanted = TARGETS[target]
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([features, triple, processor, KERNELS])],
        env=os.environ | {FORMAT_VARIABLE: str(Q4), "PYTHONPATH": str(load.PACKAGES), "NUMBA_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    chosen, found = json.loads(ran.stdout)
    assert chosen == target.removesuffix("-arm")
    for name, instruction in zip(KERNELS, expected, strict=True):
        symbol, assembly = found[name]
        assert f"{symbol}:" in assembly.replace('"', ""), name
        assert len(re.findall(instruction, assembly)) >= 4, name
        assert unwanted is None or not re.search(unwanted, assembly), name
        assert not re.search(r"NRT_|Py[A-Z_]|numba_", assembly), name  # nothing of Python's or Numba's run time
