"""native/load.py: kernels are compiled once, found again, never mistaken for others, and what fails says why."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hybrid_kernels.bandwidth import layout
from hybrid_kernels.native import load
from hybrid_kernels.native.arguments import words
from hybrid_kernels.native.kernel_names import SOURCES, Kernel, kernel
from hybrid_kernels.native.load import KernelError, KernelLibrary
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.row_codes import FORMATS

QUICK = kernel("read_memory")  # the smallest kernel there is
PROGRAM = "from hybrid_kernels.native.load import *; KernelLibrary(print).address(Kernel('read_memory'))"


def use_cache(monkeypatch, folder):
    """As the user's cache, on every system."""
    monkeypatch.setattr(load.platformdirs, "user_cache_dir", lambda name: str(folder / name))


def kernels_folder(cache) -> Path:
    return cache / "hybrid-runtime" / "kernels" / load.cache_key()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A cache into which read_memory was compiled in earnest, and what was said meanwhile."""
    cache, said = tmp_path_factory.mktemp("cache"), []
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_cache(monkeypatch, cache)
        KernelLibrary(said.append).address(QUICK)
    return kernels_folder(cache) / f"{QUICK}.o", said


@pytest.fixture
def cache(tmp_path, monkeypatch, compiled):
    """A cache of this test's own that holds read_memory."""
    folder = tmp_path / "cache"
    use_cache(monkeypatch, folder)
    kernels_folder(folder).mkdir(parents=True)
    (kernels_folder(folder) / f"{QUICK}.o").write_bytes(compiled[0].read_bytes())
    return folder


@pytest.fixture
def compilers(monkeypatch, compiled):
    """Compilers that are done at once, because they know read_memory's code; the kernels that they were asked for."""
    asked = []

    class QuickCompiler:
        def __init__(self, kernels, folder, finished):
            asked.extend(kernels)
            for each in kernels:
                (folder / f"{each}.o").write_bytes(compiled[0].read_bytes())
                finished.put(str(each))
            finished.put(None)

        def check(self):
            """Nothing can fail here."""

    monkeypatch.setattr(load, "_Compiler", QuickCompiler)
    return asked


def call_read_memory(address):
    """The exclusive-or of a block that is all 0 but for one word."""
    memory, sums = np.zeros(layout.BLOCK_BYTES // 8, dtype=np.int64), np.zeros(8, dtype=np.int64)
    memory[77] = 12345
    arguments = words(3, {layout.MEMORY: memory, layout.NUM_BYTES: memory.nbytes, layout.SUMS: sums})
    counter, returned = np.zeros(1, dtype=np.int64), np.zeros(2, dtype=np.int64)
    function = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3)(address)
    function(returned.ctypes.data, returned.ctypes.data + 8, arguments.ctypes.data, 0, counter.ctypes.data)
    return int(sums[0])


def test_compiling_is_said_with_what_and_where(compiled):
    path, said = compiled
    assert said[0].startswith("compiling 1 kernels for ")
    assert str(path.parent) in said[0]
    assert said[1].startswith("compiled read_memory (1 of 1, ")
    assert len(said) == 2


def test_what_is_in_the_cache_is_loaded_without_a_process_or_a_word(cache, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    said = []
    library = KernelLibrary(said.append)
    assert call_read_memory(library.address(QUICK)) == 12345
    assert said == []


def test_a_kernel_is_loaded_once(cache):
    library = KernelLibrary()
    first = library.address(QUICK)
    (kernels_folder(cache) / f"{QUICK}.o").unlink()
    assert library.address(QUICK) == first


DAMAGES = {
    "truncated": lambda code: code[:-100],
    "half": lambda code: code[: len(code) // 2],
    "empty": lambda _: b"",
    "only the header": lambda code: code.split(b"\n")[0],
    "a bit": lambda code: code[:-9] + bytes([code[-9] ^ 1]) + code[-8:],
    "a byte more": lambda code: code + b"\0",
    "no JSON": lambda code: b"x" + code,
    "another JSON": lambda code: b"[1]\n" + code.split(b"\n", 1)[1],
    "no digest": lambda code: b'{"symbol": "x"}\n' + code.split(b"\n", 1)[1],
    "a number for a digest": lambda code: b'{"symbol": "x", "sha256": 3}\n' + code.split(b"\n", 1)[1],
    "bytes that are no text": lambda code: b"\xff\xfe" + code,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_compiled_again(cache, compilers, damage):
    path = kernels_folder(cache) / f"{QUICK}.o"
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert call_read_memory(KernelLibrary().address(QUICK)) == 12345
    assert compilers == [QUICK]
    assert path.read_bytes() == good


def test_only_what_is_missing_is_compiled(cache, compilers):
    KernelLibrary().prepare([QUICK, kernel("route")])
    assert compilers == [kernel("route")]


def test_a_cache_that_cannot_be_written_costs_a_compilation_each_time(tmp_path, monkeypatch, compilers):
    blocked = tmp_path / "file"
    blocked.write_text("where the cache's folder would be")
    use_cache(monkeypatch, blocked)
    folders = []
    for number in (1, 2):
        said = []
        assert call_read_memory(KernelLibrary(said.append).address(QUICK)) == 12345
        assert len(compilers) == number
        folders.append(Path(said[0].split("(kept in ")[1].split(")")[0]))
    assert not any(folder.exists() for folder in folders)  # they are temporary, and gone with the compilation


def test_a_cache_that_cannot_be_written_is_read_all_the_same(cache, monkeypatch):
    monkeypatch.setattr(load, "_writable", lambda *_: pytest.fail("asked for a folder to write"))
    KernelLibrary().address(QUICK)


def test_other_sources_instructions_or_files_have_another_key(tmp_path, monkeypatch):
    native = tmp_path / "package" / "native"
    native.mkdir(parents=True)
    monkeypatch.setattr(load, "__file__", str(native / "load.py"))
    find_key = load.cache_key.__wrapped__
    source = tmp_path / "package" / "kernel.py"
    source.write_text("one")
    keys = [find_key(), find_key()]
    assert keys[0] == keys[1]
    source.write_text("two")
    keys.append(find_key())
    source.rename(source.with_name("other.py"))
    keys.append(find_key())
    (native / "more.py").write_text("")
    keys.append(find_key())
    monkeypatch.setattr(load, "instruction_set", lambda: "another")
    keys.append(find_key())
    assert len(set(keys)) == 5
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in keys)


def test_kernels_of_other_sources_are_not_used(cache, compilers, monkeypatch):
    monkeypatch.setattr(load, "cache_key", lambda: "0" * 16)
    KernelLibrary().address(QUICK)
    assert compilers == [QUICK]
    assert (kernels_folder(cache) / f"{QUICK}.o").is_file()


def test_old_folders_are_removed_when_something_is_compiled(cache, compilers):
    kept = kernels_folder(cache)
    others = [kept.with_name(f"old-{age}") for age in range(6)]
    for age, other in enumerate(others):
        other.mkdir()
        (other / "read_memory.o").write_text("old")
        (other / ".lock").touch()
        os.utime(other, (1e9 - age, 1e9 - age))
    KernelLibrary().address(QUICK)
    assert all(other.is_dir() for other in others)  # a hit removes nothing
    KernelLibrary().address(kernel("route"))
    assert [other.is_dir() for other in others] == [age < load.OLD_FOLDERS for age in range(6)]
    assert (kept / f"{QUICK}.o").is_file()


def in_fresh_processes(cache, program, number=1, **variables):
    """Run it in that many processes at once, with a cache; their exit codes, outputs and errors."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    search = [str(load.PACKAGES), variables.pop("PYTHONPATH", ""), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, search))} | variables
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(number)
    ]
    ends = [each.communicate(timeout=200) for each in running]
    return [(each.returncode, *end) for each, end in zip(running, ends, strict=True)]


needs_xdg = pytest.mark.skipif(sys.platform != "linux", reason="the cache is moved by XDG_CACHE_HOME, which is Linux's")


@needs_xdg
def test_processes_that_start_together_compile_once(tmp_path):
    ends = in_fresh_processes(tmp_path, PROGRAM, number=3)
    assert [code for code, _, _ in ends] == [0, 0, 0], ends
    assert sum(said.count("compiled read_memory") for _, said, _ in ends) == 1


BROKEN = {
    "raises": ("raise RuntimeError('this source is broken')", "RuntimeError: this source is broken", 1),
    "no such function": ("", "has no attribute 'broken'", 1),
    "does not compile": ("def broken(a, b, c):\n    return nonsense(a)", "nonsense", 1),
    "ends the process": ("import os\nos._exit(7)", "", 7),
}


@needs_xdg
@pytest.mark.parametrize(("source", "message", "code"), BROKEN.values(), ids=BROKEN)
def test_a_kernel_that_cannot_be_compiled_says_why(tmp_path, monkeypatch, source, message, code):
    """The compiling process finds another source under read_memory's name: its start-up file puts it there."""
    (tmp_path / "broken_kernel.py").write_text(source)
    (tmp_path / "sitecustomize.py").write_text(
        "from hybrid_kernels.native.kernel_names import SOURCES\nSOURCES['read_memory'] = 'broken_kernel:broken'\n"
    )
    use_cache(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(KernelError) as failure:
        KernelLibrary().address(QUICK)
    assert f"the kernels could not be compiled (exit {code}):" in str(failure.value)
    assert message in str(failure.value)
    assert not list((tmp_path / "cache").rglob("*.o*"))


def test_a_compiler_that_leaves_nothing_is_reported(cache, compilers, monkeypatch):
    monkeypatch.setattr(load, "_compile", lambda *_: None)
    with pytest.raises(KernelError, match=r"route\.o: was compiled, but cannot be read back"):
        KernelLibrary().address(kernel("route"))


def test_a_file_names_its_symbol_and_digest(compiled):
    header = json.loads(compiled[0].read_bytes().partition(b"\n")[0])
    assert header.keys() == {"symbol", "sha256"}
    assert "read_memory" in header["symbol"]


def test_every_kernel_of_a_format_is_a_file_of_its_own():
    names = {str(kernel(name, row_format)) for name in ("project", "run_neurons") for row_format in FORMATS}
    assert len(names) == 2 * len(FORMATS)
    assert str(kernel("project", RowFormat("q4", 64))) == "project-q4-64"
    assert str(kernel("project", RowFormat("f32"))) == "project-f32"
    assert str(kernel("attend")) == "attend"


@pytest.mark.parametrize(
    ("name", "format_idx", "message"),
    [
        ("nothing", -1, "kernel 'nothing' is not one of run_program, "),
        ("attend", 0, "kernel attend with row format number 0"),
        ("project", -1, "kernel project with row format number -1"),
        ("project", len(FORMATS), f"kernel project with row format number {len(FORMATS)}"),
    ],
)
def test_a_kernel_that_there_cannot_be_is_refused(name, format_idx, message):
    with pytest.raises(ValueError, match=message):
        Kernel(name, format_idx)


def test_kernels_of_different_formats_are_compiled_by_different_processes():
    """Numba compiles a function that kernels share once a process, for the format of that process."""
    kernels = sorted(
        kernel(name, row_format) for name in ("project", "run_neurons", "quantize_batch") for row_format in FORMATS[2:]
    )
    batches = load._batches([*kernels, QUICK])
    assert sorted(each for batch in batches for each in batch) == sorted([*kernels, QUICK])
    assert all(len({each.format_idx for each in batch}) == 1 for batch in batches)
    assert set(SOURCES) >= {each.name for batch in batches for each in batch}
