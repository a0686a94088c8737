"""Speeds are measured once for a machine, kept, and measured anew for another one or from a damaged file."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from hybrid_runtime.errors import BudgetError
from hybrid_runtime.machine import Machine
from hybrid_runtime.speeds import machine_speeds as module
from hybrid_runtime.speeds.disk import DiskSpeeds
from hybrid_runtime.speeds.kernel_speeds import KernelSpeeds, measure_kernel_speeds
from hybrid_runtime.speeds.machine_speeds import machine_speeds, speed_now, with_disk_of

from ..placement.made_up import GPU, Q4, Q8, kernel_of, speeds_of  # noqa: TID252  # absolute names are the runtime's

MACHINE = Machine("a processor", 4, 8, 1 << 34, 1 << 34, 1 << 33, ("avx2",), None, 0, "none", "3.12", "2.9", "0.6")


@pytest.fixture
def measured(monkeypatch):
    """What was measured, by name, instead of measuring it."""
    calls = []

    def apart(measure, *arguments):
        if measure is measure_kernel_speeds:
            row_format, num_threads, _ = arguments
            calls.append(str(row_format))
            return replace(kernel_of(row_format), num_threads=num_threads)
        machine, identity, num_threads, folder = arguments
        folder.mkdir(exist_ok=True)
        calls.append(machine.cpu_name)
        return replace(speeds_of(), identity=identity, num_threads=num_threads, gpu=GPU, kernels=())

    monkeypatch.setattr(module, "_apart", apart)
    return calls


@pytest.fixture
def ask(tmp_path):
    said = []

    def ask(machine=MACHINE, row_format=Q4, num_threads=2, **options):
        return machine_speeds(machine, row_format, num_threads, tmp_path / "cache", said.append, **options)

    ask.said = said
    ask.files = lambda: sorted((tmp_path / "cache").iterdir())
    return ask


def test_the_second_time_nothing_is_measured(measured, ask):
    first = ask()
    assert measured == ["a processor", str(Q4)]
    assert ask.said == [
        "measuring this machine's memory, disk and GPU, once ...",
        f"measuring this machine's kernels for {Q4}, once ...",
    ]
    (file,) = ask.files()
    assert file.name == f"speeds-{first.identity[:16]}.json"
    before = file.read_bytes()
    assert ask() == first
    assert (len(measured), len(ask.said), file.read_bytes()) == (2, 2, before)
    assert first.kernel(Q4) == kernel_of(Q4)


def test_another_format_is_measured_beside_the_first(measured, ask):
    ask()
    both = ask(row_format=Q8)
    assert measured == ["a processor", str(Q4), str(Q8)]
    assert [each.row_format for each in both.kernels] == [Q4, Q8]
    assert ask(row_format=Q4) == ask(row_format=Q8) == both
    assert len(measured) == 3


@pytest.mark.parametrize(
    "other",
    [
        {"cpu_name": "another"},
        {"physical_cores": 5},
        {"usable_cores": 7},
        {"total_ram_bytes": 1 << 35},
        {"gpu_name": "a GPU", "vram_bytes": 1 << 33},
        {"torch_version": "3.0"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_machine_is_measured_anew(measured, ask, other):
    first = ask()
    second = ask(replace(MACHINE, **other))
    assert second.identity != first.identity
    assert len(measured) == 4
    assert len(ask.files()) == 2
    assert ask() == first  # whose file is still there
    assert len(measured) == 4


def test_another_number_of_threads_is_measured_anew_and_free_memory_is_not(measured, ask):
    ask()
    assert ask(num_threads=3).num_threads == 3
    assert len(measured) == 4
    ask(replace(MACHINE, available_ram_bytes=1, python_version="4"))
    assert len(measured) == 4


def test_other_kernels_are_measured_anew(measured, ask, monkeypatch):
    ask()
    monkeypatch.setattr(module, "cache_key", lambda: "of another version")
    ask()
    assert len(measured) == 4


def test_another_driver_is_measured_anew(measured, ask, monkeypatch):
    ask()
    monkeypatch.setattr(module, "driver_version", lambda: "580.65.06")
    ask()
    assert len(measured) == 4


def test_who_interrupts_the_kernels_keeps_the_rest(measured, ask, monkeypatch):
    without_interrupt = module._apart

    def interrupted(measure, *arguments):
        if measure is measure_kernel_speeds:
            raise KeyboardInterrupt
        return without_interrupt(measure, *arguments)

    monkeypatch.setattr(module, "_apart", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask()
    assert measured == ["a processor"]
    assert len(ask.files()) == 1
    monkeypatch.setattr(module, "_apart", without_interrupt)
    ask()
    assert measured == ["a processor", str(Q4)]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: "[1]",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace(f'"version": {module.FORMAT_VERSION}', '"version": 1'),
        lambda text: text.replace('"identity": "', '"identity": "0'),
        lambda text: text.replace('"memory_bytes_per_s"', '"memory"'),
        lambda text: text.replace('"operation_s": ', '"operation_s": -'),
        lambda text: text.replace('"operation_s": 4e-06', '"operation_s": NaN'),
        lambda text: text.replace('"row_kind": "q4"', '"row_kind": "q5"'),
    ],
    ids=["empty", "list", "cut", "version", "identity", "field", "negative", "nan", "format"],
)
def test_a_damaged_file_is_measured_anew(measured, ask, spoil):
    first = ask()
    (file,) = ask.files()
    sound = file.read_text()
    assert spoil(sound) != sound
    file.write_text(spoil(sound))
    assert ask() == first
    assert len(measured) == 4
    assert file.read_text() == sound


def test_measuring_again_replaces_what_is_there(measured, ask):
    ask()
    ask(row_format=Q8)
    again = ask(measures_again=True)
    assert [each.row_format for each in again.kernels] == [Q4]
    (file,) = ask.files()
    assert len(json.loads(file.read_text())["kernels"]) == 1
    assert len(measured) == 5


def test_files_are_what_was_measured(measured, ask):
    speeds = ask()
    (file,) = ask.files()
    assert json.loads(file.read_text()) == json.loads(json.dumps(asdict(speeds)))


def test_a_store_on_another_disk_has_its_own_speed(monkeypatch, tmp_path):
    store, cache, said = tmp_path / "store", tmp_path / "cache", []
    store.mkdir()
    found, measured = DiskSpeeds(7.0, 8.0, past_cache=True), []
    monkeypatch.setattr(module, "measure_disk", lambda folder: measured.append(folder) or found)
    speeds = speeds_of()
    assert with_disk_of(speeds, store, cache, said.append) is speeds  # one disk holds both
    stat = type(store).stat

    def other_device(path, **options):
        values = list(stat(path, **options))
        values[2] += path == store
        return os.stat_result(values)

    monkeypatch.setattr(type(store), "stat", other_device)
    for _ in range(2):
        assert with_disk_of(speeds, store, cache, said.append) == replace(speeds, disk=found)
    assert measured == [store]
    assert said == [f"measuring the disk of {store}, once ..."]
    (file,) = cache.iterdir()
    file.write_text("{")
    assert with_disk_of(speeds, store, cache, said.append).disk == found
    assert measured == [store, store]
    file.unlink()

    def full(_folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "measure_disk", full)
    assert with_disk_of(speeds, store, cache, said.append) is speeds
    assert said[-1] == f"{store}: cannot be measured (No space left on device); taking the speed of {cache}'s disk"


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_speeds_that_nothing_has_are_refused(value):
    with pytest.raises(ValueError, match=r"row_s is .*, expected a finite number >= 0"):
        KernelSpeeds("q4", 32, 1, 0.0, value, 1.0, 1.0, 1.0, 1.0, 0.0)


def test_measuring_apart_gives_the_answer_and_errors_back():
    assert module._apart(max, 3, 5) == 5
    with pytest.raises(ZeroDivisionError):
        module._apart(divmod, 1, 0)


def test_a_process_that_dies_is_told_by_its_exit_code():
    with pytest.raises(BudgetError, match=r"exit code 9; it takes up to 1\.5 GiB"):
        module._apart(os._exit, 9)


INTERRUPTED = """
import os, sys, threading
from pathlib import Path
from hybrid_runtime.machine import describe_machine
from hybrid_runtime.speeds import machine_speeds
from tests.hybrid_runtime.placement.made_up import Q4

def measure(*arguments):
    (arguments[-1] / "left").write_bytes(b"much")
    threading.Event().wait()  # for ever: nobody sets it

machine_speeds._measure = measure
if __name__ == "__main__":
    try:
        machine_speeds.machine_speeds(describe_machine(), Q4, 1, Path(sys.argv[1]), print)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="this system has no masks of signals")
@pytest.mark.parametrize("waits_for", ["a folder", "a file in it"])
def test_ctrl_c_is_quiet_and_leaves_nothing(tmp_path, waits_for):
    """Whether the other process is still importing or has begun to write."""
    (tmp_path / "program.py").write_text(INTERRUPTED)
    cache = tmp_path / "cache"
    command = [sys.executable, str(tmp_path / "program.py"), str(cache)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pattern = "measuring-*" if waits_for == "a folder" else "measuring-*/left"
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while process.poll() is None and not list(cache.glob(pattern)):
            os.sched_yield()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (1.0, None),
        (0.85, None),
        (0.5, "other programs seem to use it"),
        (1.5, "hybrid-doctor --measure measures again"),
    ],
)
def test_memory_at_another_speed_than_was_measured_is_told(monkeypatch, share, words):
    speeds = speeds_of()
    asked = []

    def read_bandwidth(team, num_bytes, seconds):
        asked.append((team.num_threads, num_bytes))
        return share * speeds.memory_bytes_per_s

    monkeypatch.setattr(module, "read_bandwidth", read_bandwidth)
    line = speed_now(speeds)
    assert asked == [(speeds.num_threads, max(module.BUSY_BYTES, 3 * speeds.cache_bytes))]
    assert line is None if words is None else (words in line and f"{100 * share:.0f} %" in line)
