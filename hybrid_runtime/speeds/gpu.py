"""How fast a GPU reads its memory, takes data from the host, and answers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

COPY_BYTES = 256 << 20
PINNED_BYTES = 64 << 20
NUM_ROUNDS = 9
NUM_LAUNCHES = 200


@dataclass(frozen=True, slots=True)
class GpuSpeeds:
    """memory_bytes_per_s: that a kernel reads; to_gpu_bytes_per_s, from_gpu_bytes_per_s: copies of pinned memory;
    round_trip_s: a few bytes there and back with the host waiting; launch_s: from one small kernel to the next.
    """

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    to_gpu_bytes_per_s: float
    from_gpu_bytes_per_s: float
    round_trip_s: float
    launch_s: float


def _published(name: str, gib: float, memory_gb_per_s: float, pcie_gb_per_s: float) -> GpuSpeeds:
    """From a data sheet: 85 % of the memory's and 80 % of the bus's figure; latencies as commonly measured (gpu.md)."""
    pcie = 0.8e9 * pcie_gb_per_s
    return GpuSpeeds(name, int(gib * 2**30), 0.85e9 * memory_gb_per_s, pcie, pcie, 12e-6, 4e-6)


KNOWN_GPUS: Mapping[str, GpuSpeeds] = MappingProxyType(
    {
        "rtx-2080ti": _published("RTX 2080 Ti", 11, 616, 15.75),
        "rtx-3060": _published("RTX 3060 12 GB", 12, 360, 31.5),
        "rtx-3090": _published("RTX 3090", 24, 936, 31.5),
        "rtx-4060": _published("RTX 4060 8 GB", 8, 272, 15.75),
        "rtx-4090-laptop": _published("RTX 4090 Laptop", 16, 576, 31.5),
        "rtx-4090": _published("RTX 4090", 24, 1008, 31.5),
    }
)
"""From data sheets, to plan for a machine that one does not have; never measured here."""


def measure_gpu() -> GpuSpeeds | None:
    """Of the first GPU; None where torch can use none. Takes about a second and 0.6 GiB of its memory."""
    if not torch.cuda.is_available():
        return None
    try:
        properties = torch.cuda.get_device_properties(0)
    except RuntimeError:  # as machine.py, which tells why: a driver is there and the device refuses
        return None
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    host = torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    few_host, few = (
        torch.empty(64, dtype=torch.uint8, pin_memory=True),
        torch.empty(64, dtype=torch.uint8, device="cuda"),
    )

    def there_and_back() -> None:
        few.copy_(few_host, non_blocking=True)
        few_host.copy_(few, non_blocking=True)
        torch.cuda.synchronize()

    def launches() -> None:
        for _ in range(NUM_LAUNCHES):
            few.add_(1)

    return GpuSpeeds(
        name=str(properties.name),
        memory_bytes=int(properties.total_memory),
        memory_bytes_per_s=2 * COPY_BYTES / _seconds(lambda: target.copy_(source)),
        to_gpu_bytes_per_s=PINNED_BYTES / _seconds(lambda: target[:PINNED_BYTES].copy_(host, non_blocking=True)),
        from_gpu_bytes_per_s=PINNED_BYTES / _seconds(lambda: host.copy_(source[:PINNED_BYTES], non_blocking=True)),
        round_trip_s=_host_seconds(there_and_back),
        launch_s=_seconds(launches) / NUM_LAUNCHES,
    )


def _seconds(work: Callable[[], object]) -> float:
    """Median of several runs by the GPU's own clock, after one that warms up."""
    times = []
    for _ in range(NUM_ROUNDS + 1):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        started.record()
        work()
        ended.record()
        ended.synchronize()
        times.append(started.elapsed_time(ended) / 1000)
    return float(statistics.median(times[1:]))


def _host_seconds(work: Callable[[], object]) -> float:
    """The same by the host's clock, for what the host waits for: the GPU's own does not see it notice."""
    times = []
    for _ in range(NUM_ROUNDS + 1):
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - started_s)
    return statistics.median(times[1:])


def driver_version(root: Path = Path("/")) -> str | None:
    """Of NVIDIA's kernel module on Linux; None where there is none, or the system does not tell."""
    try:
        return (root / "sys/module/nvidia/version").read_text(encoding="utf-8").strip()
    except OSError:
        return None
