"""A synthetic store: true shapes, sane numbers, a tokenizer that fits, resumed like a conversion, refused by name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybrid_kernels.quantization.op import dequantize_rows
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.demo import make_demo
from hybrid_runtime.errors import UsageError
from hybrid_runtime.progress import NoProgress
from hybrid_runtime.store.layout import Quantization, lay_out
from hybrid_runtime.store.reader import open_store
from hybrid_runtime.stores import ModelRequest, convert_model, load_store_tokenizer
from hybrid_runtime.synthetic.request import SyntheticRequest, make_synthetic, plan_synthetic
from hybrid_runtime.synthetic.shapes import SHAPES, find_shape

from ..store.converting import (  # noqa: TID252  # absolute names are the runtime's
    StopAfter,
    contents,
    interrupt,
)

TINY = [name for name in SHAPES if name.startswith(("tiny-", "stories")) and name != "tinyllama-1.1b"]


def num_parameters(shape):
    f32 = lay_out(shape.config, Quantization(RowFormat("f32")), shape.predictor_ranks())
    total = 0
    for entry in (entry for part in f32 for entry in part.entries):
        size = 1
        for length in entry.shape:
            size *= length
        total += size
    return total


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("turbosparse-mixtral", 51_796_250_624),  # to the byte what its index says
        ("turbosparse-mistral", 7_985_434_624),  # 15,970,910,688 bytes of bf16 shards, less 41,440 of headers
        ("bamboo-7b", 7_241_732_096),
        ("llama-2-7b", 6_738_415_616),
        ("prosparse-llama-2-13b", 13_015_864_320),
        ("sparseqwen2-7b", 7_615_616_512),
        ("mixtral-8x7b", 46_702_792_704),
        ("tinyllama-1.1b", 1_100_048_384),
    ],
)
def test_shapes_have_the_published_number_of_weights(name, published):
    assert num_parameters(find_shape(name)) == published


def test_predictor_ranks_are_the_published_ones():
    assert sum(find_shape("turbosparse-mixtral").layer_ranks) == 33_152
    assert sum(find_shape("turbosparse-mistral").layer_ranks) == 40_320
    for shape in SHAPES.values():
        assert len(shape.layer_ranks) in (0, shape.config.num_hidden_layers)
        assert bool(shape.layer_ranks) == (shape.config.predictor_input is not None)
        assert (shape.active is not None) == shape.config.activation.is_sparse


@pytest.mark.parametrize("name", TINY)
def test_a_store_is_whole_and_named_synthetic(make, name):
    store = make(name)
    store.verify()
    assert store.manifest.model == f"synthetic-{name}"
    assert store.manifest.source.startswith("synthetic ")
    assert store.manifest.config == find_shape(name).config
    assert store.manifest.predictor_ranks == find_shape(name).predictor_ranks()


@pytest.mark.parametrize("name", SHAPES)
def test_its_tokenizer_has_the_whole_vocabulary_and_gives_text_back(name, tmp_path):
    shape = find_shape(name)
    conversion = plan_synthetic(SyntheticRequest(name, num_layers=1), tmp_path)
    conversion.save_tokenizer(tmp_path)
    again = tmp_path / "again"
    conversion.save_tokenizer(again)
    assert contents(again).items() <= contents(tmp_path).items()
    assert conversion.config == shape.with_layers(1).config


def test_text_survives_the_tokenizer_and_other_ids_are_words(make):
    store = make("stories260k")
    tokenizer, template = load_store_tokenizer(store)
    assert template is None
    assert tokenizer.vocab_size == store.manifest.config.vocab_size
    ids = tokenizer.encode("Täglich 3 €\n")
    assert ids[0] == 1
    assert tokenizer.decode(ids[1:]) == "Täglich 3 €\n"
    assert tokenizer.decode([300, 511]) == " word300 word511"


def test_fewer_layers_keep_their_shapes_and_the_name_says_so(make):
    store = make("tiny-turbosparse", scale=0.6)
    assert store.manifest.model == "synthetic-tiny-turbosparse-2-of-3-layers"
    assert list(store.manifest.predictor_ranks.values()) == [192, 256]
    assert make("tiny-turbosparse", num_layers=2).manifest == store.manifest
    assert make("tiny-turbosparse", scale=0.01).manifest.config.num_hidden_layers == 1


@pytest.mark.parametrize("quant", ["q4", "q8", "bf16", "f32"])
@pytest.mark.parametrize("name", ["stories260k", "tiny-turbosparse-mixture"])
def test_every_weight_is_finite_in_every_format(make, name, quant):
    store = make(name, quant=quant)
    for part in store.manifest.parts:
        for weight in dict(store.read_part(part)).values():
            if isinstance(weight, torch.Tensor):
                assert weight.isfinite().all()
                continue
            data = weight.rows if hasattr(weight, "rows") else weight.data.view(-1, weight.data.shape[-1])
            columns = weight.columns if hasattr(weight, "columns") else weight.hidden_size
            assert dequantize_rows(data, columns, weight.row_format).abs().max() < 20


def test_an_interrupted_store_is_resumed_to_the_same_bytes(make, tmp_path):
    request = SyntheticRequest("tiny-turbosparse")
    whole = make("tiny-turbosparse")
    folder = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        make_synthetic(request, folder, StopAfter(whole.num_bytes // 2, interrupt))
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("data-*/layer-*.bin")}
    assert kept
    store = make_synthetic(request, folder, NoProgress())
    assert store.manifest == whole.manifest
    store.verify()
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in folder.glob("data-*/*.bin")}.items()


def test_another_request_replaces_a_synthetic_store_but_no_converted_one(tmp_path):
    synthetic, converted = tmp_path / "synthetic", tmp_path / "converted"
    first = make_synthetic(SyntheticRequest("stories260k"), synthetic, NoProgress())
    second = make_synthetic(SyntheticRequest("stories260k", seed=5), synthetic, NoProgress())
    assert first.manifest.sha256 != second.manifest.sha256
    assert open_store(synthetic).manifest == second.manifest
    assert len(list(synthetic.glob("data-*"))) == 1
    demo = make_demo(tmp_path / "demo")
    convert_model(ModelRequest(str(demo)), converted, tmp_path / "cache", NoProgress())
    before = contents(converted)
    with pytest.raises(UsageError, match=r"converted: holds demo, which is not synthetic; choose another folder"):
        make_synthetic(SyntheticRequest("stories260k"), converted, NoProgress())
    assert contents(converted) == before


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (SyntheticRequest("turbosparse-mistal"), "--like turbosparse-mistal: did you mean turbosparse-mistral"),
        (SyntheticRequest("gpt-5"), "--like gpt-5: .*known shapes are turbosparse-mistral, turbosparse-mixtral, "),
        (SyntheticRequest("mistral-7b", scale=0), "--scale 0: expected a share of the layers, above 0 and up to 1"),
        (SyntheticRequest("mistral-7b", scale=float("nan")), "--scale nan: "),
        (SyntheticRequest("mistral-7b", scale=1.5), "--scale 1.5: "),
        (SyntheticRequest("mistral-7b", num_layers=33), "--layers 33: mistral-7b has 32; expected 1 to 32"),
        (SyntheticRequest("mistral-7b", num_layers=0), "--layers 0: "),
        (SyntheticRequest("mistral-7b", num_layers=3, scale=0.5), "--layers and --scale both say"),
        (SyntheticRequest("mistral-7b", active=0.1), "--active 0.1: mistral-7b computes silu_glu.* leave it out"),
        (SyntheticRequest("mistral-7b", skew=0.1), "--skew 0.1: mistral-7b computes silu_glu"),
        (SyntheticRequest("bamboo-7b", active=0), "--active 0: expected the share of neurons that fire"),
        (SyntheticRequest("bamboo-7b", active=float("nan")), "--active nan: "),
        (SyntheticRequest("bamboo-7b", active=12), "--active 12: .* 0.005 to 0.9"),
        (SyntheticRequest("bamboo-7b", active=0.5, skew=0.3), "--skew 0.3: where 0.5 of all .* is between 0.4"),
        (SyntheticRequest("bamboo-7b", active=0.8), "--skew 0.43: where 0.8 of all neurons fire"),
        (SyntheticRequest("bamboo-7b", skew=float("nan")), "--skew nan: "),
        (SyntheticRequest("bamboo-7b", quant="q3"), "--quant q3: expected one of f32, bf16, q8, q4"),
        (SyntheticRequest("bamboo-7b", quant="q4", group=48), "--group 48: expected one of 32, 64, 128"),
        (SyntheticRequest("bamboo-7b", quant="f32", group=32), "--group 32: f32 weights share no scales"),
        (
            SyntheticRequest("tiny-turbosparse", group=128),
            "--group 128: too wide for tiny-turbosparse, whose predictor",
        ),
        (SyntheticRequest("bamboo-7b", seed=-1), "--seed -1: expected a whole number from 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused_by_name_before_any_work(request_, message, tmp_path):
    folder = tmp_path / "store"
    with pytest.raises(UsageError, match=message):
        make_synthetic(request_, folder, NoProgress())
    assert not folder.exists()


PEAK = """
import re, sys
from hybrid_tools.synth import main
assert main(sys.argv[1:]) == 0
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])  # rusage would begin with the parent's peak
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_peak_memory_is_far_below_the_stores_size(tmp_path):
    """A store of 0.8 GB with planted predictors; torch alone takes 0.2 GB."""
    argv = ["--like", "turbosparse-mistral", "--layers", "4", "-o", str(tmp_path / "store")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", PEAK, *argv], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) < 512 * 1024
    assert open_store(tmp_path / "store").num_bytes > 0.8e9


def test_models_md_lists_every_shape():
    text = (Path(__file__).parents[3] / "models.md").read_text().partition("## Random weights")[2]
    listed = text.partition("Shapes: ")[2].partition(" for tests")[0]
    assert set(re.findall(r"[a-z][a-z0-9.-]*[a-z0-9]", listed)) - {"and"} == set(SHAPES)
