"""Known GPUs are plausible, and where there is a real one it is measured."""

from types import SimpleNamespace

import pytest
import torch

from hybrid_runtime.speeds import gpu as module
from hybrid_runtime.speeds.gpu import KNOWN_GPUS, GpuSpeeds, driver_version, measure_gpu


def check(speeds, *, memory_gb_per_s):
    low, high = memory_gb_per_s
    assert low * 1e9 <= speeds.memory_bytes_per_s <= high * 1e9
    for rate in (speeds.to_gpu_bytes_per_s, speeds.from_gpu_bytes_per_s):
        assert 1e9 <= rate <= 0.9 * speeds.memory_bytes_per_s
    assert 0.2e-6 <= speeds.launch_s <= speeds.round_trip_s <= 200e-6


@pytest.mark.parametrize("name", KNOWN_GPUS)
def test_data_sheets_are_plausible(name):
    speeds = KNOWN_GPUS[name]
    check(speeds, memory_gb_per_s=(200, 1100))
    assert name == name.lower()
    assert name.split("-")[1][:4] in speeds.name
    assert speeds.memory_bytes % 2**30 == 0
    assert 8 <= speeds.memory_bytes >> 30 <= 24


def test_what_is_known_of_two_of_them():
    assert KNOWN_GPUS["rtx-4060"] == GpuSpeeds("RTX 4060 8 GB", 8 << 30, 0.85 * 272e9, 12.6e9, 12.6e9, 12e-6, 4e-6)
    assert KNOWN_GPUS["rtx-4090"].memory_bytes_per_s == pytest.approx(857e9, rel=0.01)
    with pytest.raises(TypeError):
        KNOWN_GPUS["mine"] = KNOWN_GPUS["rtx-4060"]  # type: ignore[index]


def test_without_cuda_there_is_nothing_to_measure(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert measure_gpu() is None


def test_a_gpu_that_refuses_is_none(monkeypatch):
    def refuses(_):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", refuses)
    assert measure_gpu() is None


class FakeGpu:
    """A clock that each piece of work puts forward: copies by their bytes, anything small by a fixed time.

    Work that only the GPU does is ready at once for the host, which waits when it synchronises.
    """

    memory_bytes_per_s, bus_bytes_per_s, launch_s, notice_s = 400e9, 20e9, 2e-6, 9e-6

    def __init__(self, monkeypatch):
        self.now_s = 100.0
        monkeypatch.setattr(module, "COPY_BYTES", 1 << 20)
        monkeypatch.setattr(module, "PINNED_BYTES", 1 << 18)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        properties = SimpleNamespace(name="fake", total_memory=8 << 30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: FakeEvent(self))
        monkeypatch.setattr(torch, "empty", lambda size, **where: FakeMemory(self, size, "device" in where))
        monkeypatch.setattr(torch, "empty_like", lambda other: FakeMemory(self, other.size, other.on_gpu))
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now_s))

    def synchronize(self):
        self.now_s += self.notice_s


class FakeEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at_s = self.gpu.now_s

    def synchronize(self):
        self.gpu.synchronize()  # after the end was recorded: the host's wait is not the GPU's work

    def elapsed_time(self, ended):
        return 1000 * (ended.at_s - self.at_s)


class FakeMemory:
    def __init__(self, gpu, size, on_gpu):
        self.gpu, self.size, self.on_gpu = gpu, size, on_gpu

    def __getitem__(self, part):
        return FakeMemory(self.gpu, part.stop, self.on_gpu)

    def copy_(self, source, *, non_blocking=False):
        assert source.size == self.size
        assert non_blocking or self.on_gpu == source.on_gpu
        crosses = self.on_gpu != source.on_gpu
        speed = self.gpu.bus_bytes_per_s if crosses else self.gpu.memory_bytes_per_s / 2  # a read and a write
        self.gpu.now_s += self.size / speed

    def add_(self, _):
        assert self.on_gpu
        self.gpu.now_s += self.gpu.launch_s


def test_times_become_the_speeds_that_they_tell(monkeypatch):
    FakeGpu(monkeypatch)
    speeds = measure_gpu()
    assert (speeds.name, speeds.memory_bytes) == ("fake", 8 << 30)
    assert speeds.memory_bytes_per_s == pytest.approx(400e9, rel=1e-3)
    assert speeds.to_gpu_bytes_per_s == pytest.approx(20e9, rel=1e-3)
    assert speeds.from_gpu_bytes_per_s == pytest.approx(20e9, rel=1e-3)
    assert speeds.launch_s == pytest.approx(2e-6, rel=1e-3)
    assert speeds.round_trip_s == pytest.approx(9e-6 + 2 * 64 / 20e9, rel=1e-3)  # the host's wait is part of it


@pytest.mark.parametrize("seconds_of", [module._seconds, module._host_seconds])
def test_the_median_counts_and_the_first_time_does_not(monkeypatch, seconds_of):
    gpu = FakeGpu(monkeypatch)
    durations = iter([50.0, *[1.0] * 4, 3.0, *[8.0] * 4])
    assert module.NUM_ROUNDS == 9

    def work():
        gpu.now_s += next(durations)

    assert seconds_of(work) == pytest.approx(3.0)
    assert next(durations, None) is None


def test_the_drivers_version_is_read_where_there_is_one(tmp_path):
    assert driver_version(tmp_path) is None
    (tmp_path / "sys/module/nvidia").mkdir(parents=True)
    (tmp_path / "sys/module/nvidia/version").write_text("580.65.06\n")
    assert driver_version(tmp_path) == "580.65.06"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, torch sees none")
def test_this_gpu_is_measured():
    speeds = measure_gpu()
    check(speeds, memory_gb_per_s=(50, 10_000))
    assert speeds.memory_bytes == torch.cuda.get_device_properties(0).total_memory
    assert speeds.name == torch.cuda.get_device_properties(0).name
