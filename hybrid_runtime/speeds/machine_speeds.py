"""What was measured of this machine, once: in the user's cache, under a name that follows from the hardware.

Another processor, GPU, driver, number of cores, amount of memory or version of our kernels measures anew. So does
another disk: the file lies on the one that was measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from hybrid_kernels.bandwidth.op import read_bandwidth
from hybrid_kernels.native.instruction_sets import instruction_set
from hybrid_kernels.native.load import cache_key
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.team import Team
from hybrid_runtime.errors import BudgetError, CheckpointError
from hybrid_runtime.machine import Machine, cache_bytes
from hybrid_runtime.speeds.disk import DiskSpeeds, measure_disk
from hybrid_runtime.speeds.gpu import GpuSpeeds, driver_version, measure_gpu
from hybrid_runtime.speeds.kernel_speeds import KernelSpeeds, measure_kernel_speeds
from hybrid_runtime.strict_json import parse_json_object
from hybrid_runtime.typed_json import from_json
from hybrid_runtime.whole_files import write_whole

FORMAT_VERSION = 2
BUSY_BYTES = 256 << 20  # read to see how busy memory is, or some times the caches, if they are large
MOST_BUSY_BYTES = 1 << 30
USUAL = (0.8, 1.25)  # how far two measurements of an idle machine lie apart

Say = Callable[[str], None]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class MachineSpeeds:
    """measured_at: UTC. memory_bytes_per_s: read by num_threads threads; cache_bytes: of the last level of caches.

    kernels: of the row formats that were asked for so far. gpu: None where there is none.
    """

    version: int
    identity: str
    measured_at: str
    cpu_name: str
    num_threads: int
    cache_bytes: int
    memory_bytes_per_s: float
    disk: DiskSpeeds
    gpu: GpuSpeeds | None
    kernels: tuple[KernelSpeeds, ...]

    def kernel(self, row_format: RowFormat) -> KernelSpeeds:
        """Of one row format, which must have been measured."""
        return next(each for each in self.kernels if each.row_format == row_format)


def machine_speeds(
    machine: Machine,
    row_format: RowFormat,
    num_threads: int,
    cache_dir: Path,
    say: Say,
    *,
    measures_again: bool = False,
) -> MachineSpeeds:
    """What the cache holds, and what it lacks measured now. Takes some ten seconds the first time."""
    identity = _identity(machine, num_threads)
    path = cache_dir / f"speeds-{identity[:16]}.json"
    speeds = None if measures_again else _read(path, identity)
    if speeds is None:
        say("measuring this machine's memory, disk and GPU, once ...")
        with _scratch(cache_dir) as folder:
            speeds = _apart(_measure, machine, identity, num_threads, folder)
        _write(path, speeds)  # before the kernels, which take longer: who interrupts them keeps this
    if all(each.row_format != row_format for each in speeds.kernels):
        say(f"measuring this machine's kernels for {row_format}, once ...")
        with _scratch(cache_dir) as folder:
            kernel = _apart(measure_kernel_speeds, row_format, num_threads, folder)
        speeds = replace(speeds, kernels=(*speeds.kernels, kernel))
        _write(path, speeds)
    return speeds


def with_disk_of(speeds: MachineSpeeds, folder: Path, cache_dir: Path, say: Say) -> MachineSpeeds:
    """The same with the speed of the disk that the folder is on, measured once where that is another than the cache's.

    A folder that cannot be written to, or is full, keeps the cache's figure, and a line says so.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    if folder.stat().st_dev == cache_dir.stat().st_dev:
        return speeds
    of_disk = os.statvfs(folder)
    name = hashlib.sha256(repr((speeds.identity, of_disk.f_fsid, of_disk.f_blocks)).encode()).hexdigest()
    path = cache_dir / f"disk-{name[:16]}.json"
    disk = _read_disk(path)
    if disk is None:
        say(f"measuring the disk of {folder}, once ...")
        try:
            disk = measure_disk(folder)
        except OSError as error:
            say(f"{folder}: cannot be measured ({error.strerror}); taking the speed of {cache_dir}'s disk")
            return speeds
        write_whole(path, (json.dumps(asdict(disk), indent=1) + "\n").encode())
    return replace(speeds, disk=disk)


def speed_now(speeds: MachineSpeeds) -> str | None:
    """What to say where memory is read at another speed than was measured: somebody else uses it, now or then.

    Takes some tenths of a second, and BUSY_BYTES to MOST_BUSY_BYTES of memory.
    """
    team = Team(speeds.num_threads)
    try:
        now = read_bandwidth(team, min(max(BUSY_BYTES, 3 * speeds.cache_bytes), MOST_BUSY_BYTES), 0.1)
    finally:
        team.close()
    share = now / speeds.memory_bytes_per_s
    if USUAL[0] <= share <= USUAL[1]:
        return None
    busy = (
        "other programs seem to use it, and times will be longer while they do"
        if share < 1
        else "it was busy then: hybrid-doctor --measure measures again"
    )
    return (
        f"memory is read at {now / 1e9:.1f} GB/s now, {100 * share:.0f} % of what was measured ({speeds.measured_at}) "
        f"and is planned with; {busy}"
    )


def _read_disk(path: Path) -> DiskSpeeds | None:
    """None where nothing usable is."""
    if not path.is_file():
        return None
    try:
        return from_json(DiskSpeeds, parse_json_object(path.read_bytes(), str(path)), path.name)
    except (CheckpointError, TypeError, ValueError):
        return None


def _write(path: Path, speeds: MachineSpeeds) -> None:
    write_whole(path, (json.dumps(asdict(speeds), indent=1) + "\n").encode())


def _apart(measure: Callable[..., Result], *arguments: object) -> Result:
    """Measure in a process of its own: what it takes of memory is not this one's, which may have promised a peak.

    Ctrl-C is ours alone to answer: the other process is ended, and whose folder it wrote to removes what it left.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, measure, arguments), daemon=True)
    result: Result
    error: Exception | None
    try:
        with _interrupts_held():  # which a process inherits
            process.start()
        sender.close()
        result, error = receiver.recv()
    except EOFError:
        process.join()
        raise BudgetError(
            f"measuring this machine ended with exit code {process.exitcode}; it takes up to 1.5 GiB of memory"
        ) from None
    finally:
        if process.is_alive():
            process.kill()
            process.join()
        receiver.close()
    if error is not None:
        raise error
    return result


def _send_result(sender: Connection, measure: Callable[..., object], arguments: Sequence[object]) -> None:
    try:
        sender.send((measure(*arguments), None))
    except (ArithmeticError, OSError, RuntimeError, ValueError) as error:  # it is the caller's
        sender.send((None, error))


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Keep Ctrl-C from this thread until the end, where a system has such masks."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which lets Ctrl-C through again when a first process starts it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _scratch(cache_dir: Path) -> Iterator[Path]:
    """A folder for what is measured, on the disk that is: removed whatever happens to the one that measures."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="measuring-", dir=cache_dir) as folder:
        yield Path(folder)


def _measure(machine: Machine, identity: str, num_threads: int, folder: Path) -> MachineSpeeds:
    team = Team(num_threads)
    try:
        bandwidth = read_bandwidth(team)
    finally:
        team.close()
    return MachineSpeeds(
        version=FORMAT_VERSION,
        identity=identity,
        measured_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        cpu_name=machine.cpu_name,
        num_threads=num_threads,
        cache_bytes=cache_bytes(),
        memory_bytes_per_s=bandwidth,
        disk=measure_disk(folder),
        gpu=measure_gpu(),
        kernels=(),
    )


def _read(path: Path, identity: str) -> MachineSpeeds | None:
    """What was measured before; None where nothing usable was. A damaged file is measured anew."""
    if not path.is_file():
        return None
    try:
        speeds = from_json(MachineSpeeds, parse_json_object(path.read_bytes(), str(path)), path.name)
    except (CheckpointError, TypeError, ValueError):
        return None
    return speeds if speeds.version == FORMAT_VERSION and speeds.identity == identity else None


def _identity(machine: Machine, num_threads: int) -> str:
    """Hex digest of everything that speeds follow from."""
    parts = (
        FORMAT_VERSION,
        machine.cpu_name,
        machine.physical_cores,
        machine.usable_cores,
        machine.total_ram_bytes,
        machine.gpu_name,
        machine.vram_bytes,
        driver_version(),
        machine.torch_version,
        instruction_set(),
        cache_key(),
        num_threads,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()
