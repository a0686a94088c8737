"""Compiled kernels of this process: from the user's cache, or compiled by helper processes, each machine once.

The cache is a folder named by a digest of this package's sources, of Numba's and LLVM's versions and of the processor,
so that other code is never mistaken for this. Each file carries a digest of its own: what is damaged is compiled again.
Where the folder cannot be written, kernels are compiled into a temporary one for this process.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from hybrid_kernels.native.build import host_target
from hybrid_kernels.native.instruction_sets import instruction_set
from hybrid_kernels.native.kernel_names import SLOW_TO_COMPILE, Kernel

Say = Callable[[str], None]
OLD_FOLDERS = 3  # digests kept beside the newest, for those who switch between versions
MOST_COMPILERS = 4  # each takes a core and about 300 MB
PACKAGES = Path(__file__).parents[2]  # the folder that this package is imported from


class KernelError(RuntimeError):
    """A kernel could not be compiled."""


class KernelLibrary:
    """Addresses of compiled kernels, valid while this object lives. What is not there yet is loaded when asked for."""

    def __init__(self, say: Say | None = None) -> None:
        self._say = say or _say_nothing
        self._addresses: dict[Kernel, int] = {}
        self._engines: list[Any] = []
        self._lock = threading.Lock()

    def address(self, wanted: Kernel) -> int:
        """Address of a kernel of build.py's signature."""
        self.prepare([wanted])
        return self._addresses[wanted]

    def prepare(self, wanted: Iterable[Kernel]) -> None:
        """Load these, after compiling together what the cache does not hold, about which `say` hears.

        Raises KernelError where that fails.
        """
        with self._lock:
            missing = sorted({kernel for kernel in wanted if kernel not in self._addresses})
            if missing:
                for kernel, (symbol, code) in _objects(missing, self._say).items():
                    self._addresses[kernel] = self._link(symbol, code)

    def _link(self, symbol: str, code: bytes) -> int:
        import llvmlite.binding as llvm  # noqa: PLC0415  # a native library, loaded where it is needed

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(opt=3, jit=True)
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        self._engines.append(engine)
        return int(engine.get_function_address(symbol))


def _objects(kernels: list[Kernel], say: Say) -> dict[Kernel, tuple[str, bytes]]:
    """Symbol and object code of each, from the cache, or compiled into it."""
    with ExitStack() as stack:
        folder = _cache_folder()
        found = {kernel: _read_object(folder / f"{kernel}.o") for kernel in kernels}
        missing = [kernel for kernel, code in found.items() if code is None]
        if missing:
            folder = _writable(folder, stack)
            with filelock.FileLock(folder / ".lock"):
                missing = [kernel for kernel in missing if _read_object(folder / f"{kernel}.o") is None]
                _compile(missing, folder, say)
            found |= {kernel: _read_object(folder / f"{kernel}.o") for kernel, code in found.items() if code is None}
        for kernel, code in found.items():
            if code is None:
                raise KernelError(f"{folder / f'{kernel}.o'}: was compiled, but cannot be read back")
        return {kernel: code for kernel, code in found.items() if code is not None}


def _say_nothing(message: str) -> None:
    del message


def _cache_folder() -> Path:
    return Path(platformdirs.user_cache_dir("hybrid-runtime")) / "kernels" / cache_key()


@cache
def cache_key() -> str:
    """Sixteen hex digits over everything that decides what the object code is."""
    target = host_target()
    parts = [target.triple, target.cpu, target.features, instruction_set(), sys.version.split()[0]]
    parts += [importlib.metadata.version(name) for name in ("numba", "llvmlite")]
    digest = hashlib.sha256("\n".join(parts).encode())
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _read_object(path: Path) -> tuple[str, bytes] | None:
    """Symbol and code; None where the file is absent or damaged."""
    try:
        header, _, code = path.read_bytes().partition(b"\n")
        fields = json.loads(header)
        if fields["sha256"] == hashlib.sha256(code).hexdigest():
            return str(fields["symbol"]), code
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None


def _writable(folder: Path, stack: ExitStack) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_old(folder)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hybrid-kernels-")))


def _remove_old(folder: Path) -> None:
    others = [other for other in folder.parent.iterdir() if other.is_dir() and other != folder]
    others.sort(key=lambda other: other.stat().st_mtime, reverse=True)
    for other in others[OLD_FOLDERS:]:
        for path in other.iterdir():
            path.unlink(missing_ok=True)
        other.rmdir()


def _compile(kernels: list[Kernel], folder: Path, say: Say) -> None:
    """Compile in several processes, because Numba compiles one function at a time in each."""
    if not kernels:
        return
    started_s = time.perf_counter()
    say(f"compiling {len(kernels)} kernels for {instruction_set()}, once on this machine (kept in {folder}) ...")
    finished: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    waiting, running = _batches(kernels), []
    num_running = num_done = 0
    while waiting or num_running:
        while waiting and num_running < min(MOST_COMPILERS, _usable_cores()):
            running.append(_Compiler(waiting.pop(), folder, finished))
            num_running += 1
        name = finished.get()
        if name is None:
            num_running -= 1
            continue
        num_done += 1
        say(f"compiled {name} ({num_done} of {len(kernels)}, {time.perf_counter() - started_s:.0f} s)")
    for compiler in running:
        compiler.check()


def _batches(kernels: list[Kernel]) -> list[list[Kernel]]:
    """What one process compiles: kernels of one format. The last take longest, and are begun first."""
    batches: dict[tuple[int, str], list[Kernel]] = {}
    for kernel in kernels:
        alone = kernel.name if kernel.name in SLOW_TO_COMPILE else ""
        batches.setdefault((kernel.format_idx, alone), []).append(kernel)
    return sorted(batches.values(), key=lambda batch: (batch[0].name == "run_neurons", len(batch[0].name), len(batch)))


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class _Compiler:
    """A process that compiles some kernels one after another, and the thread that listens to it."""

    def __init__(self, kernels: list[Kernel], folder: Path, finished: queue.SimpleQueue[str | None]) -> None:
        pairs = [text for kernel in kernels for text in (kernel.name, str(folder / f"{kernel}.o"))]
        search = os.pathsep.join([str(PACKAGES), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by check
        self._process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
            [sys.executable, "-m", "hybrid_kernels.native.build", str(kernels[0].format_idx), *pairs],
            env=os.environ | {"NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": search},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._finished = finished
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._finished.put(line.strip())
        self._process.wait()
        self._finished.put(None)

    def check(self) -> None:
        """Raise KernelError where the process has failed."""
        self._errors.seek(0)
        error = self._errors.read().decode(errors="replace")[-4000:]
        self._errors.close()
        if self._process.returncode:
            raise KernelError(f"the kernels could not be compiled (exit {self._process.returncode}):\n{error}")
