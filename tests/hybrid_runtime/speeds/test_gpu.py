"""Known GPUs are plausible, and where there is a real one it is measured."""

import pytest
import torch

from hybrid_runtime.speeds.gpu import KNOWN_GPUS, GpuSpeeds, measure_gpu


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, torch sees none")
def test_this_gpu_is_measured():
    speeds = measure_gpu()
    check(speeds, memory_gb_per_s=(50, 10_000))
    assert speeds.memory_bytes == torch.cuda.get_device_properties(0).total_memory
    assert speeds.name == torch.cuda.get_device_properties(0).name
