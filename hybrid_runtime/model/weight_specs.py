"""Every weight that a configuration calls for, by canonical name (families/family.py), with its shape and its role."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hybrid_runtime.config import ModelConfig

Role = Literal["vector", "matrix", "embedding", "head", "shared_keys", "router", "neurons"]
"""vector, router: always float32. neurons: part of a bundle. embedding, head, shared_keys: kept a notch finer than the
rest; shared_keys is a k_proj whose heads are shared by several queries each."""


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """shape: rows, columns; a None stands for a size that only the checkpoint knows (a predictor's rank)."""

    name: str
    shape: tuple[int | None, ...]
    role: Role


def global_weights(config: ModelConfig) -> Iterator[WeightSpec]:
    """Embeddings, the last norm and the head (absent where it is tied to the embedding)."""
    hidden = config.hidden_size
    yield WeightSpec("embed_tokens", (config.vocab_size, hidden), "embedding")
    if config.learned_position_offset is not None:
        positions = config.max_position_embeddings + config.learned_position_offset
        yield WeightSpec("embed_positions", (positions, hidden), "embedding")
    yield from _norm("norm", config)
    if not config.tie_word_embeddings:
        yield WeightSpec("lm_head", (config.vocab_size, hidden), "head")


def layer_weights(config: ModelConfig, layer_idx: int) -> Iterator[WeightSpec]:
    """One layer: norms, attention, router, and its FFN or its experts."""
    layer = f"layers.{layer_idx}"
    yield from _norm(f"{layer}.input_layernorm", config)
    yield from _attention(f"{layer}.self_attn", config)
    yield from _norm(f"{layer}.post_attention_layernorm", config)
    if config.num_experts:
        yield WeightSpec(f"{layer}.mlp.router", (config.num_experts, config.hidden_size), "router")
    for ffn in ffn_names(config, layer_idx):
        yield from ffn_weights(ffn, config)


def ffn_names(config: ModelConfig, layer_idx: int) -> tuple[str, ...]:
    """Canonical prefixes of a layer's FFNs: one, or one an expert."""
    mlp = f"layers.{layer_idx}.mlp"
    return tuple(f"{mlp}.experts.{idx}" for idx in range(config.num_experts)) or (mlp,)


def ffn_weights(ffn: str, config: ModelConfig) -> Iterator[WeightSpec]:
    """One FFN: gate (where there is one), up, down, biases, predictor."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    if config.activation.is_gated:
        yield WeightSpec(f"{ffn}.gate_proj", (intermediate, hidden), "neurons")
    yield WeightSpec(f"{ffn}.up_proj", (intermediate, hidden), "neurons")
    yield WeightSpec(f"{ffn}.down_proj", (hidden, intermediate), "neurons")
    if config.mlp_bias:
        if config.activation.is_gated:
            yield WeightSpec(f"{ffn}.gate_proj.bias", (intermediate,), "vector")
        yield WeightSpec(f"{ffn}.up_proj.bias", (intermediate,), "vector")
        yield WeightSpec(f"{ffn}.down_proj.bias", (hidden,), "vector")
    if config.predictor_input is not None:
        yield WeightSpec(f"{ffn}.predictor.fc1", (None, hidden), "matrix")
        yield WeightSpec(f"{ffn}.predictor.fc2", (intermediate, None), "matrix")


def all_weights(config: ModelConfig) -> Iterator[WeightSpec]:
    """Every weight of the model."""
    yield from global_weights(config)
    for layer_idx in range(config.num_hidden_layers):
        yield from layer_weights(config, layer_idx)


def _norm(name: str, config: ModelConfig) -> Iterator[WeightSpec]:
    yield WeightSpec(name, (config.hidden_size,), "vector")
    if config.norm == "layer":
        yield WeightSpec(f"{name}.bias", (config.hidden_size,), "vector")


def _attention(name: str, config: ModelConfig) -> Iterator[WeightSpec]:
    hidden = config.hidden_size
    query, key_value = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    for projection, rows in (("q_proj", query), ("k_proj", key_value), ("v_proj", key_value)):
        is_shared = projection == "k_proj" and config.num_key_value_heads < config.num_attention_heads
        yield WeightSpec(f"{name}.{projection}", (rows, hidden), "shared_keys" if is_shared else "matrix")
        if config.qkv_bias:
            yield WeightSpec(f"{name}.{projection}.bias", (rows,), "vector")
    yield WeightSpec(f"{name}.o_proj", (hidden, query), "matrix")
    if config.output_bias:
        yield WeightSpec(f"{name}.o_proj.bias", (hidden,), "vector")
