"""From a Python function to object code: Numba types and optimises it, LLVM emits it for this machine or for another.

A kernel is a function (arguments, worker, counter) of three int64: the address of its arguments, the number of the
worker that runs it, and the address from which workers draw their shares of the work. It touches memory through
addresses only, allocates nothing and raises nothing, so the object needs nothing but libc and libm.

    python -m hybrid_kernels.native.build FORMAT NAME FILE...    what load.py runs: kernels and their new files

A process compiles for one row format (its number, or -1), because Numba compiles a function that kernels share once.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_kernels.native.emitted_format import FORMAT_VARIABLE
from hybrid_kernels.native.kernel_names import SOURCES


@dataclass(frozen=True, slots=True)
class Target:
    """What object code is emitted for: an LLVM triple, processor and feature string."""

    triple: str
    cpu: str
    features: str


def host_target() -> Target:
    """What this machine is."""
    import llvmlite.binding as llvm  # noqa: PLC0415

    return Target(llvm.get_process_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())


def kernel_function(name: str) -> Callable[..., None]:
    """The kernel's Python function."""
    module, _, attribute = SOURCES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def kernel_ir(function: Callable[..., None]) -> tuple[str, str]:
    """Optimised LLVM assembly of a kernel, and its symbol in it."""
    import numba  # noqa: PLC0415  # only who compiles needs it

    signature = numba.void(numba.int64, numba.int64, numba.int64)
    options: dict[str, Any] = {"_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    compiled = numba.njit(signature, error_model="numpy", fastmath={"contract"}, **options)(function)
    overload = compiled.overloads[compiled.signatures[0]]
    return overload.library.get_llvm_str(), overload.fndesc.llvm_func_name


def emit(assembly: str, target: Target, *, as_text: bool = False) -> bytes:
    """Object code, or the target's assembly language as_text, of a module in LLVM assembly."""
    import llvmlite.binding as llvm  # noqa: PLC0415

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, reloc="default", codemodel="jitdefault", jit=not as_text
    )
    lines = [line for line in assembly.splitlines() if not line.startswith(("target triple", "target datalayout"))]
    module = llvm.parse_assembly("\n".join(lines))
    module.triple = target.triple
    module.data_layout = str(machine.target_data)
    return machine.emit_assembly(module).encode() if as_text else bytes(machine.emit_object(module))


def build(name: str, path: Path) -> None:
    """Compile one kernel into path: a line of JSON that names its symbol and digest, then the object."""
    assembly, symbol = kernel_ir(kernel_function(name))
    code = emit(assembly, host_target())
    header = json.dumps({"symbol": symbol, "sha256": hashlib.sha256(code).hexdigest()})
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(header.encode() + b"\n" + code)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def main(argv: list[str]) -> None:
    """Compile pairs of a name and a file, and print each name when it is done."""
    os.environ[FORMAT_VARIABLE] = argv[0]
    words = iter(argv[1:])
    for name, destination in zip(words, words, strict=True):
        build(name, Path(destination))
        print(Path(destination).stem, flush=True)  # noqa: T201  # the parent counts these lines


if __name__ == "__main__":
    main(sys.argv[1:])
