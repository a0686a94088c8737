"""What this machine offers this process: cores, memory, instruction sets, a GPU. Looked at only when asked.

Linux is read from /proc and /sys/fs/cgroup, where a container's share is written beside the whole machine's; every
reader takes the root they hang under, so that a test can show it another machine. Where there is no /proc (macOS,
Windows) psutil and llvmlite answer instead. Nothing here decides how much of it to use: that is a budget's business.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Protocol

ROOT: Final = Path("/")
# Prefixes and not names, so that next year's avx512_... or sve... is shown without a change here. Apart, because x86
# has an sme flag too, which is memory encryption.
_X86_VECTOR_SETS: Final = ("amx", "avx", "bmi", "f16c", "fma", "sse", "ssse")
_OTHER_VECTOR_SETS: Final = ("asimd", "bf16", "dotprod", "fphp", "fullfp16", "i8mm", "neon", "sme", "sve", "vsx")


@dataclass(frozen=True, slots=True)
class Machine:
    """What `describe_machine` found; plain values, so that a benchmark can write them down beside its numbers."""

    cpu_name: str
    physical_cores: int  # of the whole machine
    usable_cores: int  # logical ones that affinity and a cgroup's CPU quota leave to this process
    total_ram_bytes: int  # of the whole machine
    ram_limit_bytes: int  # the least of total_ram_bytes and the memory limits of this process's cgroups
    available_ram_bytes: int  # of ram_limit_bytes, what can be had now without swapping
    instruction_sets: tuple[str, ...]  # the vector ones, sorted, as the operating system names them
    gpu_name: str | None
    vram_bytes: int  # 0 where there is no usable GPU
    no_gpu_reason: str | None  # why gpu_name is None
    python_version: str
    torch_version: str
    numba_version: str


def describe_machine(root: Path = ROOT) -> Machine:
    """Look at everything once. Imports torch to ask it for a GPU, which takes seconds the first time."""
    import torch  # noqa: PLC0415  # heavy, and only this function needs it

    gpu_name, vram_bytes, no_gpu_reason = _gpu(torch.cuda)
    return Machine(
        cpu_name=cpu_name(root),
        physical_cores=physical_cores(root),
        usable_cores=usable_cores(root),
        total_ram_bytes=total_ram_bytes(root),
        ram_limit_bytes=ram_limit_bytes(root),
        available_ram_bytes=available_ram_bytes(root),
        instruction_sets=instruction_sets(root),
        gpu_name=gpu_name,
        vram_bytes=vram_bytes,
        no_gpu_reason=no_gpu_reason,
        python_version=platform.python_version(),
        torch_version=importlib.metadata.version("torch"),
        numba_version=importlib.metadata.version("numba"),
    )


def cpu_name(root: Path = ROOT) -> str:
    """Name of the CPU model; on ARM, whose /proc/cpuinfo has none, what Python calls the architecture."""
    for processor in _processors(root):
        for key in ("model name", "Model", "cpu model", "cpu"):  # x86, some ARM boards, MIPS and LoongArch, POWER
            if processor.get(key):
                return processor[key]
    return platform.processor() or platform.machine() or "unknown CPU"


def physical_cores(root: Path = ROOT) -> int:
    """Cores of the whole machine, not counting a core's second thread."""
    # A core is known by the set of its threads: core_id alone repeats over sockets, dies and clusters.
    cores = {
        text
        for cpu in (root / "sys/devices/system/cpu").glob("cpu[0-9]*")
        if (text := _read(cpu / "topology/thread_siblings_list")) is not None
    }
    processors = _processors(root)
    if not cores and all("core id" in processor for processor in processors):
        cores = {f"{processor.get('physical id', '0')}/{processor['core id']}" for processor in processors}
    if cores or processors:
        return len(cores) or len(processors)
    return _psutil().cpu_count(logical=False) or os.cpu_count() or 1


def usable_cores(root: Path = ROOT, num_allowed: int | None = None) -> int:
    """Logical cores this process may keep busy: its affinity (num_allowed, where given) cut down to its CPU quota.

    A quota of 2.5 CPUs counts as 2: a third worker would be stopped for half of the time, and workers that meet after
    every layer all wait for it.
    """
    if num_allowed is None:
        num_allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min((_cpu_quota(folder) for folder in _cgroup_folders(root, "cpu")), default=float("inf"))
    return max(1, int(min(num_allowed, quota)))


def _cpu_quota(folder: Path) -> float:
    """How many CPUs this cgroup may use at a time; inf where it says nothing."""
    quota, period = [*(_read(folder / "cpu.max") or "").split(), "", ""][:2]  # cgroup v2: "250000 100000"
    if not quota:  # cgroup v1, where -1 is no limit
        quota, period = (_read(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period"))
    limited = quota.isdecimal() and period.isdecimal() and int(period) > 0
    return int(quota) / int(period) if limited else float("inf")


def instruction_sets(root: Path = ROOT) -> tuple[str, ...]:
    """Vector instruction sets that every processor has, as the kernel names them ('avx2', 'asimd'), sorted."""
    listed = [set((cpu.get("flags") or cpu.get("Features") or "").split()) for cpu in _processors(root)]
    if listed:
        return _vector_sets(set.intersection(*listed))
    import llvmlite.binding  # noqa: PLC0415  # it asks the CPU itself, and knows macOS and Windows

    return _vector_sets({name for name, present in llvmlite.binding.get_host_cpu_features().items() if present})


def _vector_sets(names: set[str]) -> tuple[str, ...]:
    prefixes = _X86_VECTOR_SETS if "sse2" in names else _OTHER_VECTOR_SETS
    return tuple(sorted(name for name in names if name.startswith(prefixes)))


def _processors(root: Path) -> list[dict[str, str]]:
    """/proc/cpuinfo as one dictionary a logical processor; empty where there is none."""
    paragraphs = (_read(root / "proc/cpuinfo") or "").split("\n\n")
    entries = [
        {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in paragraph.splitlines())}
        for paragraph in paragraphs
    ]
    return [entry for entry in entries if "processor" in entry]  # ARM and POWER add a paragraph about the board


def cache_bytes(root: Path = ROOT) -> int:
    """Of the largest cache that a processor reaches, maybe with others; 0 where the system does not tell."""
    folders = (root / "sys/devices/system/cpu/cpu0/cache").glob("index*")
    sizes = [_read(folder / "size") or "" for folder in folders if _read(folder / "type") != "Instruction"]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max(
        (int(size[:-1]) * units[size[-1]] for size in sizes if size[:-1].isdecimal() and size[-1] in units), default=0
    )


def total_ram_bytes(root: Path = ROOT) -> int:
    """RAM of the whole machine."""
    total = _kib_field(root / "proc/meminfo", "MemTotal")
    return int(_psutil().virtual_memory().total) if total is None else total


def ram_limit_bytes(root: Path = ROOT) -> int:
    """RAM this process could ever have: the machine's, or a cgroup's limit where one is lower."""
    limits = (_memory_limit(folder) for folder in _cgroup_folders(root, "memory"))
    return min([total_ram_bytes(root), *(limit for limit in limits if limit is not None)])


def available_ram_bytes(root: Path = ROOT) -> int:
    """RAM that can be had now without swapping, in the machine and in each cgroup this process is in."""
    available = _kib_field(root / "proc/meminfo", "MemAvailable")
    if available is None:
        available = int(_psutil().virtual_memory().available)
    for folder in _cgroup_folders(root, "memory"):
        limit = _memory_limit(folder)
        if limit is not None:
            available = min(available, max(0, limit - _memory_in_use(folder)))
    return available


def _memory_limit(folder: Path) -> int | None:
    """The lowest limit of one cgroup; above memory.high a process is slowed until it stands still."""
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")  # v2, v2, v1
    return min((limit for name in names if (limit := _number(folder / name)) is not None), default=None)


def _memory_in_use(folder: Path) -> int:
    """What a cgroup holds and cannot give back: its usage without the page cache, as MemAvailable counts it too."""
    usage = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
    stat = dict(line.split()[:2] for line in (_read(folder / "memory.stat") or "").splitlines() if " " in line)
    # total_... counts the cgroups below as well in v1, as the plain names do in v2
    cache = sum(int(stat.get(f"total_{name}", stat.get(name, 0))) for name in ("active_file", "inactive_file"))
    return max(0, usage - cache)


def current_rss_bytes(root: Path = ROOT) -> int:
    """RAM this process occupies now; Linux may leave out some pages a core, which it has not yet added up."""
    rss = _kib_field(root / "proc/self/status", "VmRSS")
    return int(_psutil().Process().memory_info().rss) if rss is None else rss


def peak_rss_bytes(root: Path = ROOT) -> int:
    """The most RAM this process has occupied since it started, as exactly as `current_rss_bytes` knows it."""
    # VmHWM first: ru_maxrss survives exec, so a small program started by a large one reports the large one's peak
    peak = _kib_field(root / "proc/self/status", "VmHWM")
    if peak is not None:
        return peak
    if sys.platform == "win32":
        return int(_psutil().Process().memory_info().peak_wset)
    import resource  # noqa: PLC0415  # Windows has none

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024  # bytes on macOS, KiB elsewhere


def reset_peak_rss(root: Path = ROOT) -> bool:
    """Let `peak_rss_bytes` begin anew from what is occupied now, where the system can; whether it could."""
    try:
        (root / "proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def huge_page_bytes(root: Path = ROOT) -> int:
    """How much of this process's anonymous memory lies in huge pages; 0 where the system does not tell."""
    return _kib_field(root / "proc/self/smaps_rollup", "AnonHugePages") or 0


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Every folder whose limit of this controller binds this process: its own cgroup and all above it, v1 and v2."""
    groups = {}  # controller, or '' for v2, to this process's path in that hierarchy
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, names, path = line.split(":", 2)
        groups.update(dict.fromkeys(names.split(","), path))
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        mount, _, source = line.partition(" - ")
        fields = mount.split()  # id, parent, device, root of the mount, mount point, ...
        kind, *_, options = source.split()
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")):
            path = groups.get("" if kind == "cgroup2" else controller, "/")
            yield from _upwards(root / fields[4].lstrip("/"), _below(path, fields[3]))


def _below(path: str, mount_root: str) -> PurePosixPath:
    """Where a cgroup lies under a mount that shows only mount_root; '.' where it lies outside of it.

    A container often sees its own cgroup mounted as the top while /proc/self/cgroup still gives the host's path.
    """
    group, top = PurePosixPath(path), PurePosixPath(mount_root)
    inside = group.is_relative_to(top) and ".." not in group.parts
    return group.relative_to(top) if inside else PurePosixPath()


def _upwards(mount_point: Path, group: PurePosixPath) -> Iterator[Path]:
    """The cgroup's folder and each one above it, up to the mount point."""
    yield mount_point / group
    for parent in group.parents:
        yield mount_point / parent


def _read(path: Path) -> str | None:
    """The file's text without blanks around it; None where it is not there or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    """The integer in a file of one number; None for 'max' and where there is no file."""
    text = _read(path)
    return int(text) if text is not None and text.isdecimal() else None


def _kib_field(path: Path, field: str) -> int | None:
    """One 'Field:   123 kB' line in bytes; the kernel's kB are 1024 bytes."""
    for line in (_read(path) or "").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None


def _psutil() -> Any:
    import psutil  # noqa: PLC0415  # only where there is no /proc

    return psutil


class _Cuda(Protocol):
    """The part of torch.cuda that is asked here (ROCm answers under the same name)."""

    def is_available(self) -> bool: ...
    def get_device_properties(self, device: int) -> Any: ...


def _gpu(cuda: _Cuda) -> tuple[str | None, int, str | None]:
    """Name and memory of the first GPU, or None, 0 and the reason why there is none to use."""
    if not cuda.is_available():
        return None, 0, "torch.cuda.is_available() is False: no NVIDIA or AMD GPU, no driver, or a torch built for CPUs"
    try:
        properties = cuda.get_device_properties(0)
    except RuntimeError as error:  # torch sees a driver and the device refuses: in use exclusively, or fallen off
        return None, 0, f"torch could not open GPU 0: {error}"
    return str(properties.name), int(properties.total_memory), None
