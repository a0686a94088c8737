"""Importing any module touches no GPU, starts no thread or process, compiles nothing; and packages import quickly."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "hybrid_kernels": ROOT / "kernels",
    "hybrid_predictors": ROOT / "predictors",
    "hybrid_runtime": ROOT,
    "hybrid_tools": ROOT / "tools",
}
LONGEST_IMPORT_S = 1.5
NUM_IMPORTS = 3

# torch and numba may start threads of their own, so they are imported first. A fork keeps only the calling thread: each
# child begins with one thread and with none of our modules, imports one of them, and reports what that left behind.
OBSERVER = """
import gc, importlib, json, os, sys, threading
import numba, torch
from numba.core.registry import CPUDispatcher

PROCESS_EVENTS = {"subprocess.Popen", "os.fork", "os.posix_spawn", "os.system", "socket.connect", "socket.bind"}

def open_devices():
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:  # the descriptor of the listing itself
            continue
        if "nvidia" in target or "/dev/dri" in target:
            yield target

def observe(name):
    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1
    events = set()
    sys.addaudithook(lambda event, _: events.add(event))
    importlib.import_module(name)
    dispatchers = [each for each in gc.get_objects() if issubclass(type(each), CPUDispatcher)]
    ours = [each for each in dispatchers if each.py_func.__module__.startswith("hybrid_")]
    return {
        "python threads": threading.active_count() - 1,
        "native threads": len(os.listdir("/proc/self/task")) - 1,
        "cuda is initialised": torch.cuda.is_initialized(),
        "open devices": sorted(open_devices()),
        "compiled": sorted(each.py_func.__qualname__ for each in ours if each.signatures),
        "processes and sockets": sorted(events & PROCESS_EVENTS),
    }

gc.freeze()  # children look only at objects made after this, and write to no page of the others
reports = {}
for name in json.loads(sys.argv[1]):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            report = observe(name)
        except BaseException as error:
            report = {"error": repr(error)}
        os.write(writer, json.dumps(report).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        reports[name] = json.loads(pipe.read() or "null")
    os.waitpid(child, 0)
print(json.dumps(reports))
"""
NOTHING = {
    "python threads": 0,
    "native threads": 0,
    "cuda is initialised": False,
    "open devices": [],
    "compiled": [],
    "processes and sockets": [],
}
GUILTY = {
    "starts_thread": ("import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"),
    "starts_process": "import subprocess\nsubprocess.run(['true'])\n",
    "compiles": "import numba\n@numba.njit('int64(int64)')\ndef twice(x):\n    return 2 * x\n",
    "fails": "raise RuntimeError('no')\n",
}


def modules_of(package: str) -> list[str]:
    folder = FOLDERS[package]
    names = []
    for path in sorted((folder / package).rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def fresh_python(program: str, *arguments: str, path: tuple[Path, ...] = tuple(FOLDERS.values())) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", program, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in Linux's /proc")


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, dict[str, object]]:
    """What every module, and each guilty one, leaves behind: one interpreter, because torch takes seconds to import."""
    folder = tmp_path_factory.mktemp("guilty")
    for name, source in GUILTY.items():
        (folder / f"hybrid_{name}.py").write_text(source)
    names = [name for package in FOLDERS for name in modules_of(package)] + [f"hybrid_{name}" for name in GUILTY]
    found = json.loads(fresh_python(OBSERVER, json.dumps(names), path=(*FOLDERS.values(), folder)))
    assert list(found) == names
    return found


@needs_proc
@pytest.mark.parametrize("package", FOLDERS)
def test_an_import_leaves_nothing_behind(package, reports):
    ours = {name: report for name, report in reports.items() if name.split(".")[0] == package}
    assert package in ours
    assert {name: report for name, report in ours.items() if report != NOTHING} == {}


@needs_proc
def test_the_observer_sees_what_it_is_for(reports):
    threads, process, compiles, fails = (reports[f"hybrid_{name}"] for name in GUILTY)
    assert (threads["python threads"], threads["native threads"]) == (1, 1)
    assert "subprocess.Popen" in process["processes and sockets"]
    assert compiles["compiled"] == ["twice"]
    assert fails == {"error": "RuntimeError('no')"}


@pytest.mark.parametrize("package", FOLDERS)
def test_a_package_imports_quickly(package):
    """Processor time, not time on the clock: what other programs on the machine take is not the import's."""
    program = f"import time; start = time.process_time(); import {package}; print(time.process_time() - start)"
    assert statistics.median(float(fresh_python(program)) for _ in range(NUM_IMPORTS)) < LONGEST_IMPORT_S
