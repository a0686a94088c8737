"""The folder that a run leaves: read by transformers, by this project's engine, and equal to an independent oracle."""

import dataclasses
import json

import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file

from hybrid_runtime.checkpoints.open import open_checkpoint
from hybrid_runtime.engine import Engine
from hybrid_runtime.errors import UsageError
from hybrid_runtime.generation.sampling import SamplingParams
from hybrid_runtime.load_options import LoadOptions
from hybrid_runtime.stores import ModelRequest
from hybrid_runtime.text.load import load_tokenizer
from hybrid_tools.training.initial import checkpoint_weights, random_weights
from hybrid_tools.training.network import forward
from hybrid_tools.training.published import write_model
from hybrid_tools.training.recipe import Shape, activation_of

from ...hybrid_runtime.model.oracles import (  # noqa: TID252  # absolute names are the runtime's
    Oracle,
    dense_ffn,
    drelu,
    glu,
    relu_glu,
    turbosparse_mixtral_ffn,
)

VOCABULARY, HEADS, KV_HEADS = 300, 4, 2
TEXTS = ("the cat saw Lily", "  two spaces\n\nand lines", "7 red balls <s> ä€😀", "")


def saved(folder, tokenizer, activation, num_experts, dtype=torch.float32):
    """A random model of few layers, written as a finished run would write it."""
    shape = Shape(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_experts=num_experts,
    )
    config = shape.config(activation_of(activation, 0.05 if activation == "fatrelu" else 0.0), VOCABULARY, 1, 2)
    weights = {name: weight * (10 if weight.ndim > 1 else 1) for name, weight in random_weights(config, 2).items()}
    rounded = {name: weight.to(dtype) for name, weight in weights.items()}
    write_model(folder, config, rounded, tokenizer, {"made_by": "a test"})
    return config, weights


@pytest.fixture(scope="module")
def tokenizer(finished_swiglu):
    return finished_swiglu / "tokenizer"


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, VOCABULARY, (24,), generator=torch.Generator().manual_seed(1))


def engine_logits(folder, tokens, cache):
    engine = Engine.load(ModelRequest(str(folder), "f32"), LoadOptions(num_positions=64, cache_dir=cache, scores=True))
    return torch.cat(list(engine.logit_batches(tokens.tolist())))


def fatrelu(gate, up):
    return torch.where(gate > 0.05, gate, 0.0) * up


def mixtral_ffn(weights, act, top_k=2):
    """As turbosparse_mixtral_ffn in the suite's oracle, for other activations."""

    def ffn(layer, _, residual, x):
        moe = f"{layer}.block_sparse_moe"
        scores = (x @ weights[f"{moe}.gate.weight"].T).softmax(-1)
        output = torch.zeros_like(x)
        for token, row in enumerate(x):
            best = scores[token].topk(top_k)
            for share, expert in zip(best.values / best.values.sum(), best.indices.tolist(), strict=True):
                output[token] += share * glu(weights, f"{moe}.experts.{expert}", row[None], act, ("w1", "w3", "w2"))[0]
        return output

    return ffn


@pytest.mark.parametrize("num_experts", [0, 4], ids=["dense", "mixture"])
@pytest.mark.parametrize("activation", ["drelu", "relu", "fatrelu"])
def test_oracle_network_and_engine_agree(activation, num_experts, tokenizer, tokens, tmp_path):
    act = {"drelu": drelu, "relu": relu_glu, "fatrelu": fatrelu}[activation]
    config, _ = saved(tmp_path / "model", tokenizer, activation, num_experts)
    published = load_file(tmp_path / "model" / "model.safetensors")
    if not num_experts:
        ffn = dense_ffn(published, act)
    elif activation == "drelu":
        ffn = turbosparse_mixtral_ffn(published, num_experts, 2)
    else:
        ffn = mixtral_ffn(published, act)
    expected = Oracle(published, ffn, HEADS, KV_HEADS).logits(tokens)
    assert expected.std() > 0.3
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.config.activation == config.activation
    weights = checkpoint_weights(checkpoint, checkpoint.config)
    network = forward(checkpoint.config, weights, tokens[None]).logits[0]
    assert (network - expected).abs().max() <= 1e-4
    assert (engine_logits(tmp_path / "model", tokens, tmp_path / "cache") - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("num_experts", [0, 4], ids=["llama", "mixtral"])
def test_transformers_network_and_engine_agree_on_swiglu(num_experts, tokenizer, tokens, tmp_path):
    saved(tmp_path / "model", tokenizer, "swiglu", num_experts)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    checkpoint = open_checkpoint(tmp_path / "model")
    network = forward(checkpoint.config, checkpoint_weights(checkpoint, checkpoint.config), tokens[None]).logits[0]
    assert expected.std() > 0.3
    assert (network - expected).abs().max() <= 1e-4
    assert (engine_logits(tmp_path / "model", tokens, tmp_path / "cache") - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("activation", "num_experts", "model_type"),
    [
        ("swiglu", 0, "llama"),
        ("relu", 0, "llama"),
        ("fatrelu", 0, "sparsellama"),
        ("drelu", 0, "bamboo"),
        ("swiglu", 4, "mixtral"),
        ("relu", 4, "mixtral"),
        ("fatrelu", 4, "mixtral"),
        ("drelu", 4, "turbosparsemixtral"),
    ],
)
def test_config_is_the_familys_that_computes_it(activation, num_experts, model_type, tokenizer, tmp_path):
    config, weights = saved(tmp_path, tokenizer, activation, num_experts, torch.bfloat16)
    published = json.loads((tmp_path / "config.json").read_text())
    assert published["model_type"] == model_type
    assert published["torch_dtype"] == "bfloat16"
    read = open_checkpoint(tmp_path)
    assert read.config.activation == config.activation
    assert (read.config.bos_token_id, read.config.eos_token_ids) == (1, (2,))
    for name, weight in checkpoint_weights(read, read.config).items():
        assert torch.equal(weight, weights[name].bfloat16().float()), name


def test_a_sliding_window_makes_a_llama_shape_a_mistral(tokenizer, tmp_path):
    config, weights = saved(tmp_path / "llama", tokenizer, "swiglu", 0)
    windowed = dataclasses.replace(config, sliding_windows=(64,) * 3)
    write_model(tmp_path / "mistral", windowed, weights, tokenizer, {})
    read = open_checkpoint(tmp_path / "mistral").config
    assert (read.family, read.sliding_windows) == ("mistral", (64,) * 3)
    assert open_checkpoint(tmp_path / "llama").config.sliding_windows == ()
    uneven = dataclasses.replace(config, sliding_windows=(None, 64, 64))
    with pytest.raises(UsageError, match=r"windows \(None, 64, 64\) has no published form"):
        write_model(tmp_path / "uneven", uneven, weights, tokenizer, {})


def test_tensor_names_are_turbosparse_mixtrals(tokenizer, tmp_path):
    saved(tmp_path, tokenizer, "drelu", 4)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.2.self_attn.o_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.1.block_sparse_moe.gate.weight",
        "model.layers.1.block_sparse_moe.experts.3.w1.weight",
        "model.layers.1.block_sparse_moe.experts.3.w2.weight",
        "model.layers.1.block_sparse_moe.experts.3.w3.weight",
    } <= names
    assert len(names) == 3 + 3 * (2 + 4 + 1 + 4 * 3)


@pytest.mark.parametrize("sentence", TEXTS, ids=repr)
def test_tokenizer_cuts_as_sentencepiece_does(sentence, finished_swiglu):
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(finished_swiglu / "model" / "tokenizer.model"))
    ours = load_tokenizer(finished_swiglu / "model")
    assert ours.encode(sentence) == [theirs.bos_id(), *theirs.encode(sentence)]


def test_finished_run_answers_a_prompt(finished_swiglu, tmp_path):
    engine = Engine.load(ModelRequest(str(finished_swiglu / "model"), "f32"), LoadOptions(cache_dir=tmp_path))
    assert len("".join(engine.generate("the cat", SamplingParams(temperature=0, max_tokens=8)))) > 0
