"""What one model family is: how its config.json reads, and what its tensors are called in our words.

Canonical tensor names are Llama's without the `model.` prefix and the `.weight` suffix:

    embed_tokens, embed_positions, norm, norm.bias, lm_head
    layers.{l}.input_layernorm[.bias], layers.{l}.post_attention_layernorm[.bias]
    layers.{l}.self_attn.{q,k,v,o}_proj[.bias]
    layers.{l}.mlp.{gate,up,down}_proj[.bias], layers.{l}.mlp.predictor.fc1, .fc2
    layers.{l}.mlp.router, layers.{l}.mlp.experts.{e}.{gate,up,down}_proj, .experts.{e}.predictor.fc1, .fc2
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from hybrid_kernels.activation import Activation
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.families.raw_config import RawConfig
from hybrid_runtime.families.rope import parse_rope

ParseConfig = Callable[[RawConfig, Activation], ModelConfig]

IGNORED_TENSORS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|masked_bias|attn\.bias)")
"""Buffers that old exports carry; they follow from config.json."""


@dataclass(frozen=True, slots=True)
class Family:
    """One family: `parse` reads config.json, `renames` are (pattern, replacement) tried in order on published names."""

    name: str
    model_types: tuple[str, ...]
    parse: ParseConfig
    renames: tuple[tuple[str, str], ...]
    default_hidden_act: str | None = None  # where config.json need not say
    activation_key: str = "hidden_act"

    def canonical_name(self, published: str) -> str | None:
        """Our name for a published tensor name; None for a name that this family does not have."""
        for pattern, replacement in self.renames:
            match = re.fullmatch(pattern, published)
            if match:
                return match.expand(replacement)
        return None


LLAMA_RENAMES: tuple[tuple[str, str], ...] = (
    (r"lm_head\.weight", "lm_head"),
    (r"model\.(embed_tokens|norm)\.weight", r"\1"),
    (r"model\.(layers\.\d+\.(?:input|post_attention)_layernorm)\.weight", r"\1"),
    (r"model\.(layers\.\d+\.self_attn\.[qkvo]_proj)\.weight", r"\1"),
    (r"model\.(layers\.\d+\.self_attn\.[qkvo]_proj\.bias)", r"\1"),
)
DENSE_RENAMES: tuple[tuple[str, str], ...] = (
    *LLAMA_RENAMES,
    (r"model\.(layers\.\d+\.mlp\.(?:gate|up|down)_proj)\.weight", r"\1"),
    (r"model\.(layers\.\d+\.mlp\.(?:gate|up|down)_proj\.bias)", r"\1"),
    (r"model\.(layers\.\d+\.mlp\.predictor\.fc[12])\.weight", r"\1"),
)


def parse_llama_like(raw: RawConfig, activation: Activation, family: str, **differences: object) -> ModelConfig:
    """The fields that every Llama-shaped config.json shares; differences are ModelConfig fields."""
    num_attention_heads = raw.integer("num_attention_heads")
    hidden_size = raw.integer("hidden_size")
    if not raw.has("head_dim") and hidden_size % num_attention_heads:
        raise raw.error("hidden_size", hidden_size, f"a multiple of num_attention_heads {num_attention_heads}")
    fields: dict[str, object] = {
        "family": family,
        "vocab_size": raw.integer("vocab_size"),
        "hidden_size": hidden_size,
        "num_hidden_layers": raw.integer("num_hidden_layers"),
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": raw.integer("num_key_value_heads", num_attention_heads),
        "head_dim": raw.integer("head_dim", hidden_size // num_attention_heads),
        "max_position_embeddings": raw.integer("max_position_embeddings", 2048),
        "activation": activation,
        "norm_eps": raw.number("rms_norm_eps", 1e-6),
        "tie_word_embeddings": raw.boolean("tie_word_embeddings", default=False),
        "bos_token_id": next(iter(raw.token_ids("bos_token_id")), None),
        "eos_token_ids": raw.token_ids("eos_token_id"),
    }
    if "intermediate_size" not in differences:
        fields["intermediate_size"] = raw.integer("intermediate_size")
    if "rope" not in differences:
        fields["rope"] = parse_rope(raw)
    return ModelConfig(**(fields | differences))  # type: ignore[arg-type]  # checked by ModelConfig itself


def every_layer_window(raw: RawConfig, default: int | None = None) -> tuple[int | None, ...]:
    """`sliding_window` for all layers; () when there is none."""
    window = one_window(raw, default)
    return () if window is None else (window,) * raw.integer("num_hidden_layers")


def one_window(raw: RawConfig, default: int | None = None) -> int | None:
    """`sliding_window`; the default stands for an absent key, which is not the same as null."""
    if "sliding_window" not in raw.values:
        return default
    return raw.integer("sliding_window") if raw.has("sliding_window") else None
