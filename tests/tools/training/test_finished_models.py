"""The folder that the command itself leaves: transformers, the network and the engine give the same logits."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from hybrid_runtime.checkpoints.open import open_checkpoint
from hybrid_runtime.engine import Engine
from hybrid_runtime.load_options import LoadOptions
from hybrid_runtime.stores import ModelRequest
from hybrid_tools.training.checkpoint import list_states, load_state
from hybrid_tools.training.initial import checkpoint_weights, random_weights
from hybrid_tools.training.network import forward
from hybrid_tools.training.published import published_name

from .tiny_runs import train

TOKENS = torch.randint(3, 300, (24,), generator=torch.Generator().manual_seed(1))
CONTINUED = ["--seq-len=32", "--batch-tokens=128", "--held-out=0.1", "--threads=1", "--device=cpu"]


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize(
    "options",
    [("--experts=0",), ("--experts=0", "--tie-embeddings"), ("--experts=4",), ("--experts=3", "--experts-per-token=1")],
    ids=["llama", "llama-tied", "mixtral", "mixtral-E3-k1"],
)
def test_transformers_network_and_engine_give_the_same_logits(activation, options, text, tmp_path):
    """A theta that is nobody's default, and a rate that makes attention matter."""
    run = tmp_path / "run"
    options = (*options, f"--activation={activation}", "--rope-theta=300", "--lr=0.02", "--save-dtype=f32")
    assert train(text, run, *options, tokens=12 * 128) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    with torch.no_grad():
        expected = model(TOKENS[None]).logits[0]
    assert expected.std() > 0.3  # else equality within the tolerance would say little
    checkpoint = open_checkpoint(run / "model")
    weights = checkpoint_weights(checkpoint, checkpoint.config)
    network = forward(checkpoint.config, weights, TOKENS[None]).logits[0]
    assert (network - expected).abs().max() <= 1e-4
    engine = Engine.load(
        ModelRequest(str(run / "model"), "f32"), LoadOptions(num_positions=64, cache_dir=tmp_path, scores=True)
    )
    assert (torch.cat(list(engine.logit_batches(TOKENS.tolist()))) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("save_dtype", ["bf16", "f32"])
def test_model_is_the_last_checkpoint_in_the_dtype_asked_for(save_dtype, text, tmp_path):
    run = tmp_path / "run"
    assert train(text, run, f"--save-dtype={save_dtype}", tokens=256) == 0
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[save_dtype]
    published = load_file(run / "model" / "model.safetensors")
    state = load_state(list_states(run / "checkpoints")[-1][1])
    assert published.keys() == {published_name(name) for name in state.weights}
    for name, weight in state.weights.items():
        assert torch.equal(published[published_name(name)], weight.to(dtype)), name
    assert json.loads((run / "model" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]


def test_weights_before_the_first_step_are_the_seeds_and_twins_share_them(text, tmp_path):
    """A rate of nearly nothing leaves what training began with."""
    found = {}
    for kind in ("swiglu", "drelu"):
        options = (f"--activation={kind}", "--lr=1e-30", "--weight-decay=0", "--save-dtype=f32", "--seed=7")
        assert train(text, tmp_path / kind, *options, tokens=128) == 0
        found[kind] = load_file(tmp_path / kind / "model" / "model.safetensors")
    config = open_checkpoint(tmp_path / "swiglu" / "model").config
    for name, weight in random_weights(config, 7).items():
        assert torch.allclose(found["swiglu"][published_name(name)], weight, atol=1e-12), name
        assert torch.allclose(found["drelu"][published_name(name)], weight, atol=1e-12), name


@pytest.mark.parametrize("num_experts", [0, 4], ids=["llama", "mixtral"])
def test_relufication_computes_the_sources_weights_with_another_activation(num_experts, text, tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    assert train(text, source, "--activation=swiglu", f"--experts={num_experts}", "--save-dtype=f32", tokens=256) == 0
    options = (f"--from={source / 'model'}", "--relufy=fatrelu", "--fatrelu-threshold=0.001", "--save-dtype=f32")
    options += ("--lr=1e-30", "--weight-decay=0")
    assert train(text, run, *options, tokens=128, sizes=CONTINUED) == 0
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["model_type"] == ("mixtral" if num_experts else "sparsellama")
    assert (config["hidden_act"], config["hidden_act_param"]) == ("fatrelu", 0.001)
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (source, run))
    assert before.keys() == after.keys()
    assert all(torch.allclose(weight, after[name], atol=1e-12) for name, weight in before.items())
    files = {path.name for path in (source / "tokenizer").iterdir()} - {"made_from.json"}
    assert files == {path.name for path in (run / "tokenizer").iterdir()} - {"made_from.json"}
    assert all((source / "model" / name).read_bytes() == (run / "model" / name).read_bytes() for name in files)
