"""Tiny models that Hugging Face transformers implements, as the cases that our decoder must agree with."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from .tiny_models import PROMPT, randomize

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# Odd on purpose: nothing is a multiple of 32 or of another size, and head_dim * heads is not hidden_size.
SIZES = {
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 51,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_HEAD_DIM = {name: size for name, size in SIZES.items() if name != "head_dim"} | {"num_attention_heads": 6}
OPT_SIZES = {
    "vocab_size": 97,
    "hidden_size": 36,
    "ffn_dim": 51,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 36,
    "dropout": 0.0,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 7.0],
}


@dataclass(frozen=True, slots=True)
class Case:
    """kind: the prefix of transformers' classes; settings: what the configuration differs in."""

    name: str
    kind: str
    settings: dict = field(default_factory=dict)
    max_shard_size: str = "1GB"


def _llama(name, max_shard_size="1GB", **settings):
    return Case(f"llama-{name}", "Llama", SIZES | settings, max_shard_size)


def _rope(name, **parameters):
    return _llama(name, rope_parameters=parameters)


CASES = (
    *(_llama(act, hidden_act=act) for act in ("silu", "relu", "gelu", "gelu_pytorch_tanh", "relu2")),
    _llama("biases", attention_bias=True, mlp_bias=True),
    _llama("mlp-bias-relu", mlp_bias=True, hidden_act="relu"),
    *(_llama(f"kv{heads}", num_key_value_heads=heads) for heads in (1, 2, 4)),
    Case("llama-no-head-dim", "Llama", NO_HEAD_DIM),
    Case("llama-I333-H100", "Llama", SIZES | {"hidden_size": 100, "intermediate_size": 333, "num_hidden_layers": 2}),
    _llama("one-layer-V1001", vocab_size=1001, num_hidden_layers=1),
    _llama("tied", tie_word_embeddings=True),
    _llama("sharded", max_shard_size="20KB"),
    _llama("tied-sharded", max_shard_size="9KB", tie_word_embeddings=True),
    _llama("eps", rms_norm_eps=0.1),
    _rope("theta", rope_type="default", rope_theta=123.0),
    _rope("linear", rope_type="linear", rope_theta=500.0, factor=3.0),
    _rope(
        "llama3",
        rope_type="llama3",
        rope_theta=500.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
    _rope("yarn", **YARN),
    _rope("yarn-attention-factor", **YARN, attention_factor=1.7),
    _rope("yarn-mscale", **YARN, mscale=3.0, mscale_all_dim=0.5),
    _rope("yarn-mscale-alone", **YARN, mscale=3.0),
    _rope("yarn-no-truncate", **YARN, truncate=False),
    _rope("yarn-betas", **YARN, beta_fast=0.8, beta_slow=0.1),
    _rope("yarn-no-original", rope_type="yarn", rope_theta=500.0, factor=4.0),
    _rope("longrope-short", **LONGROPE, original_max_position_embeddings=64),
    _rope("longrope-crossed-in-prompt", **LONGROPE, original_max_position_embeddings=32),
    _rope("longrope-crossed-in-decode", **LONGROPE, original_max_position_embeddings=48),
    _rope("longrope-attention-factor", **LONGROPE, original_max_position_embeddings=32, attention_factor=1.3),
    Case("mistral-W5", "Mistral", SIZES | {"sliding_window": 5}),
    Case("mistral-W17", "Mistral", SIZES | {"sliding_window": 17}, "20KB"),
    Case("mistral-no-window-eps", "Mistral", SIZES | {"sliding_window": None, "rms_norm_eps": 0.1}),
    Case("mixtral-eps", "Mixtral", SIZES | {"num_local_experts": 3, "rms_norm_eps": 0.1}),
    Case("qwen2-eps", "Qwen2", NO_HEAD_DIM | {"rms_norm_eps": 0.1}),
    Case("mixtral-E3-k2", "Mixtral", SIZES | {"num_local_experts": 3, "num_experts_per_tok": 2}),
    Case("mixtral-E3-k1", "Mixtral", SIZES | {"num_local_experts": 3, "num_experts_per_tok": 1}, "20KB"),
    Case("mixtral-E8-k2", "Mixtral", SIZES | {"num_local_experts": 8, "num_experts_per_tok": 2}, "20KB"),
    Case(
        "mixtral-E8-k1-relu-W5",
        "Mixtral",
        NO_HEAD_DIM | {"num_local_experts": 8, "num_experts_per_tok": 1, "hidden_act": "relu", "sliding_window": 5},
    ),
    Case(
        "mixtral-E3-k3-tied",
        "Mixtral",
        SIZES | {"num_local_experts": 3, "num_experts_per_tok": 3, "tie_word_embeddings": True},
    ),
    Case("qwen2", "Qwen2", NO_HEAD_DIM),
    Case("qwen2-tied", "Qwen2", NO_HEAD_DIM | {"tie_word_embeddings": True}, "9KB"),
    Case(
        "qwen2-W5-from-1",
        "Qwen2",
        NO_HEAD_DIM | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    Case(
        "qwen2-W5-layer-types",
        "Qwen2",
        NO_HEAD_DIM
        | {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    Case(
        "qwen2-W5-unused",
        "Qwen2",
        NO_HEAD_DIM | {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0},
    ),
    Case("opt", "OPT", OPT_SIZES),
    Case("opt-gelu-untied", "OPT", OPT_SIZES | {"activation_function": "gelu", "tie_word_embeddings": False}, "20KB"),
    Case("arcee", "Arcee", SIZES),
    Case("arcee-biases", "Arcee", SIZES | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
)


def build_model(case):
    """A transformers model with random weights that matter, in float32 and without fused attention."""
    config = getattr(transformers, f"{case.kind}Config")(**case.settings)
    config._attn_implementation = config._experts_implementation = "eager"  # the fused experts refuse odd sizes
    model = getattr(transformers, f"{case.kind}ForCausalLM")(config).eval()
    randomize(model.named_parameters())
    return model


@torch.inference_mode()
def logits_of_model(model, tokens):
    """[len(tokens), V]: the prompt at once, then one token at a time from transformers' own cache."""
    output = model(tokens[None, :PROMPT], use_cache=True)
    logits = [output.logits[0]]
    for token in tokens[PROMPT:]:
        output = model(token.view(1, 1), past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[0])
    return torch.cat(logits)
