"""From a model's folder to text with --vram, in Triton's interpreter; test_interpreted.py runs this file."""

import json

import pytest
import torch

from hybrid_kernels.attention import gpu as attention_gpu
from hybrid_runtime.cli.run import main
from hybrid_runtime.engine import Engine
from hybrid_runtime.generation.sampling import SamplingParams
from hybrid_runtime.gpu.decoder import GpuDecoder
from hybrid_runtime.load_options import LoadOptions
from hybrid_runtime.placement import planning
from hybrid_runtime.speeds.gpu import GpuSpeeds
from hybrid_runtime.spreading import SIMULATED_GPU
from hybrid_tools.convert import main as convert
from tests.hybrid_runtime.small_models import TURBOSPARSE, write_model

attention_gpu.NUM_SPLITS = 2
SIZES = {"hidden_size": 64, "vocab_size": TURBOSPARSE["vocab_size"]}
QUICK = GpuSpeeds("quick", 8 << 30, 1e15, 1e15, 1e15, 1e-9, 1e-9)  # else a tiny model has nothing on it
GREEDY = SamplingParams(temperature=0.0, max_tokens=4)
PROMPT = "Hello world"


@pytest.fixture(autouse=True)
def quick_gpu(monkeypatch):
    monkeypatch.setattr(planning, "KNOWN_GPUS", {SIMULATED_GPU: QUICK})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    write_model(folder / "checkpoint", TURBOSPARSE | SIZES)
    assert convert([str(folder / "checkpoint"), "-o", str(folder / "store"), "--quant", "f32"]) == 0
    return folder / "store"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One for all: the model is profiled once."""
    return tmp_path_factory.mktemp("cache")


def engine_of(store, cache, vram):
    options = LoadOptions(num_positions=64, vram_bytes=vram, cache_dir=cache, threads=1)
    return Engine.load(str(store), options)


def test_text_is_the_cpus(store, cache):
    on_cpu = engine_of(store, cache, 0)
    with_gpu = engine_of(store, cache, 700 << 20)
    assert isinstance(with_gpu.sequence.decoder, GpuDecoder)
    assert with_gpu.spread.plan.gpu_layers["attention"] == {0, 1}
    texts = ["".join(engine.generate(PROMPT, GREEDY)) for engine in (on_cpu, with_gpu)]
    assert texts[0] == texts[1]
    ids = with_gpu.encode(PROMPT)
    torch.testing.assert_close(with_gpu.logits(ids), on_cpu.logits(ids), atol=1e-4, rtol=1e-3)


def test_prompts_in_a_row_keep_what_they_share(store, cache):
    engines = [engine_of(store, cache, vram) for vram in (0, 700 << 20)]
    for prompt in (PROMPT, PROMPT + " and the other", "Once"):
        texts = ["".join(engine.generate(prompt, GREEDY)) for engine in engines]
        assert texts[0] == texts[1]
        assert engines[0].last_report.cached_tokens == engines[1].last_report.cached_tokens


def test_command_tells_what_computes(store, cache, tmp_path, capfd):
    trace = tmp_path / "trace.json"
    flags = ["--vram", "700M", "--ctx", "64", "--max-tokens", "3", "--temperature", "0", "--threads", "1", "-v"]
    places = ["--cache-dir", str(cache), "--trace", str(trace)]
    assert main(["--model", str(store), "--prompt", PROMPT, *flags, *places]) == 0
    err = capfd.readouterr().err
    assert "GPU        interpreted" in err
    assert "of 700.00 MiB, planned" in err
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"}
    assert {"launches", "wait for the GPU"} <= names
