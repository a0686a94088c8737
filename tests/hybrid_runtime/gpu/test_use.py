"""Whether there is a GPU, how much of it, and what happens when its driver has no more."""

import pytest
import torch

from hybrid_runtime.engine import Engine
from hybrid_runtime.errors import BudgetError, UsageError
from hybrid_runtime.gpu import use
from hybrid_runtime.gpu.device import GpuDevice
from hybrid_runtime.gpu.use import chosen_device, find_device, with_less_after_oom
from hybrid_runtime.load_options import LoadOptions
from hybrid_runtime.shipped import DEFAULT_MODEL, SHIPPED_MODELS
from hybrid_runtime.store.manifest import read_manifest

CONFIG = read_manifest(SHIPPED_MODELS[DEFAULT_MODEL]).config
GIB = 1 << 30


def test_interpreter_stands_for_a_gpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    device = find_device()
    assert device is not None
    assert device.way == "interpreted"
    assert not device.is_cuda


def test_there_is_none_without_a_driver_or_triton(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(use, "find_spec", lambda name: None)
    assert find_device() is None


@pytest.mark.parametrize(("capability", "computes"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_gpus_that_kernels_are_not_compiled_for_are_none(monkeypatch, capability, computes):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(use, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda idx: capability)
    assert (find_device() is not None) == computes


def test_vram_without_a_gpu_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(use, "find_device", lambda: None)
    with pytest.raises(UsageError, match="no GPU to compute on"):
        Engine.load(DEFAULT_MODEL, LoadOptions(vram_bytes=GIB))
    assert chosen_device(CONFIG, LoadOptions(vram_bytes=GIB, simulates_gpu=True)) is None
    assert chosen_device(CONFIG, LoadOptions()) is None


def test_another_programs_share_of_the_gpu_is_told_and_left_to_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 8 * GIB))
    device, said = GpuDevice(torch.device("cuda", 0)), []
    assert device.available_bytes(2 * GIB, said.append) == 2 * GIB
    assert said == []
    assert device.available_bytes(8 * GIB, said.append) == 3 * GIB
    assert said == ["the GPU has 3.00 GiB free of 8.00 GiB asked for: planning with these"]


def test_out_of_memory_is_tried_once_more_with_less():
    asked, said = [], []
    options = LoadOptions(vram_bytes=10 * GIB, say=said.append)

    def load(options):
        asked.append(options.vram_bytes)
        if len(asked) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return "loaded"

    assert with_less_after_oom(options, load) == "loaded"
    assert asked == [10 * GIB, 9 * GIB]
    assert said == ["the GPU has run out of memory with 10.00 GiB: trying 9.00 GiB, once"]


def test_out_of_memory_twice_is_refused_with_the_number():
    def load(options):
        raise torch.cuda.OutOfMemoryError(f"CUDA out of memory with {options.vram_bytes}")

    with pytest.raises(BudgetError, match=r"run out of memory with 9\.00 GiB, too; give less --vram"):
        with_less_after_oom(LoadOptions(vram_bytes=10 * GIB), load)
