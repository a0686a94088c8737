"""Sound folders to spoil, and what a refusal must look like."""

from __future__ import annotations

import pytest

from hybrid_runtime.checkpoints.open import open_checkpoint
from hybrid_runtime.errors import HybridError

from .published_models import (
    HIDDEN,
    INTER,
    RANKS,
    SIZES,
    SMALLTHINKER,
    TURBOSPARSE_MIXTRAL,
    VOCAB,
    dense_tensors,
    smallthinker_tensors,
    turbosparse_mixtral_tensors,
)

LLAMA = SIZES | {
    "model_type": "llama",
    "hidden_act": "silu",
    "intermediate_size": INTER,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
MIXTRAL = TURBOSPARSE_MIXTRAL | {"model_type": "mixtral", "hidden_act": "silu"}
QWEN2 = LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5}
OPT = {
    "model_type": "opt",
    "activation_function": "relu",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "ffn_dim": INTER,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}


def tensors_of(config):
    if config is SMALLTHINKER:
        return smallthinker_tensors()
    if config["model_type"] == "turbosparsemixtral":
        return turbosparse_mixtral_tensors()
    if config["model_type"] == "bamboo":
        return dense_tensors(RANKS)
    return dense_tensors(qkv_bias=config["model_type"] == "qwen2")


def refusal(folder, error, **options):
    """The message; it must start with the folder or a file in it, and be of exactly this class."""
    with pytest.raises(HybridError) as caught:
        open_checkpoint(folder, **options)
    assert type(caught.value) is error, caught.value
    assert str(caught.value).startswith(str(folder))
    return str(caught.value)
