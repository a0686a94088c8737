"""The trained dReLU models in benchmarks/models: our logits are those of the independent oracle, on text."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hybrid_runtime.text.load import load_tokenizer

from .oracles import Oracle, turbosparse_mixtral_ffn
from .tiny_models import PROMPT, STEPS, TELLING, TOLERANCE, difference, largest_difference, load

MODELS = Path(__file__).parents[3] / "benchmarks" / "models"
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine. One day, she saw "
    "a big red ball in the garden. Lily wanted to play with the ball, but it belonged to her friend Tom. Tom said yes."
)


@pytest.mark.parametrize("name", ["tinystories-moe", "tinystories-moe-seed2"])
def test_trained_sparse_mixture_gives_the_oracles_logits(name, tmp_path):
    tokens = torch.tensor(load_tokenizer(MODELS / name).encode(STORY)[: PROMPT + STEPS])
    assert len(tokens) == PROMPT + STEPS
    tensors = load_file(MODELS / name / "model.safetensors")
    loaded = load(MODELS / name, tmp_path / "store")
    config = loaded.config

    def oracle(top_k):
        ffn = turbosparse_mixtral_ffn(tensors, config.num_experts, top_k)
        heads = (config.num_attention_heads, config.num_key_value_heads)
        return Oracle(tensors, ffn, *heads, num_layers=config.num_hidden_layers, theta=config.rope.theta).logits(tokens)

    expected = oracle(config.num_experts_per_tok)
    for mode in (None, "gate", "off"):
        assert difference(loaded, tokens, expected, mode=mode) <= TOLERANCE, mode
    assert largest_difference(oracle(1), expected) > TELLING  # the second expert counts
