"""The forward pass of llama- and mixtral-shaped models with gradients: plain torch over weights by canonical name.

It computes what the engine computes (`hybrid_runtime.model`), in batches and without a cache; a test holds the two
together, another holds it to transformers. It knows no text, no optimiser and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from hybrid_kernels.activation import activate
from hybrid_kernels.norm.reference import rms_norm
from hybrid_kernels.rope.reference import apply_rope
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import UsageError
from hybrid_runtime.model.rope_frequencies import rope_frequencies
from hybrid_tools.training.mixture import Routing, mix_experts, route

Weights = Mapping[str, torch.Tensor]
OnHidden = Callable[[int, int, torch.Tensor], torch.Tensor]
"""(layer_idx, expert_idx, h: [T, I]) -> [T, I]: sees, and may replace, what goes into a down projection."""


@dataclass(frozen=True, slots=True)
class Forward:
    """logits: [B, T, V] float32; routings: one a layer, none in dense models."""

    logits: torch.Tensor
    routings: tuple[Routing, ...]


def refuse_untrainable(config: ModelConfig, seq_len: int) -> None:
    """Raise UsageError naming what this network does not compute."""
    found = {
        "layer norms": config.norm != "rms",
        "learned positions": config.rope is None or config.learned_position_offset is not None,
        "layers without rotary positions": bool(config.rope_layers) and not all(config.rope_layers),
        "biases": config.qkv_bias or config.output_bias or config.mlp_bias,
        "an ungated feed-forward network": not config.activation.is_gated,
        "a router like SmallThinker's": bool(config.num_experts)
        and (config.router_score != "softmax" or config.router_input != "post_norm"),
        "expert weights that are not normalised": bool(config.num_experts) and not config.normalize_expert_weights,
        f"a sliding window shorter than --seq-len {seq_len}": any(
            window is not None and window < seq_len for window in config.sliding_windows
        ),
    }
    for what, is_there in found.items():
        if is_there:
            raise UsageError(
                f"a {config.family} model with {what} cannot be trained here; llama and mixtral shapes can"
            )


def forward(config: ModelConfig, weights: Weights, tokens: torch.Tensor, on_hidden: OnHidden | None = None) -> Forward:
    """tokens: [B, T] int64 -> logits of every position, each seeing those before it."""
    stream = functional.embedding(tokens, weights["embed_tokens"])  # [B, T, H]
    assert config.rope is not None
    frequencies, magnitude = rope_frequencies(config.rope, config.head_dim, tokens.shape[1])
    rotation = (frequencies.to(tokens.device), magnitude)
    routings = []
    for layer_idx in range(config.num_hidden_layers):
        layer = f"layers.{layer_idx}"
        normed = rms_norm(stream, weights[f"{layer}.input_layernorm"], config.norm_eps)
        stream = stream + _attention(config, weights, f"{layer}.self_attn", normed, rotation)
        normed = rms_norm(stream, weights[f"{layer}.post_attention_layernorm"], config.norm_eps)
        output, routing = _feed_forward(config, weights, layer_idx, normed.flatten(0, 1), on_hidden)
        stream = stream + output.view_as(stream)
        if routing is not None:
            routings.append(routing)
    stream = rms_norm(stream, weights["norm"], config.norm_eps)
    head = weights["embed_tokens" if config.tie_word_embeddings else "lm_head"]
    return Forward(functional.linear(stream, head).float(), tuple(routings))


def _attention(
    config: ModelConfig, weights: Weights, name: str, x: torch.Tensor, rotation: tuple[torch.Tensor, float]
) -> torch.Tensor:
    """x: [B, T, H] -> [B, T, H], causal, keys and values shared by groups of query heads."""
    batch, length, _ = x.shape
    positions = torch.arange(length, device=x.device)

    def heads(projection: str, num_heads: int) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.{projection}"]).view(batch, length, num_heads, config.head_dim)

    queries = apply_rope(heads("q_proj", config.num_attention_heads), positions, *rotation)
    keys = apply_rope(heads("k_proj", config.num_key_value_heads), positions, *rotation)
    values = heads("v_proj", config.num_key_value_heads)
    shared_by = config.num_attention_heads // config.num_key_value_heads
    attended = functional.scaled_dot_product_attention(
        queries.transpose(1, 2).to(values.dtype),
        keys.transpose(1, 2).to(values.dtype).repeat_interleave(shared_by, dim=1),
        values.transpose(1, 2).repeat_interleave(shared_by, dim=1),
        is_causal=True,
    )  # [B, heads, T, D]
    return functional.linear(attended.transpose(1, 2).flatten(2), weights[f"{name}.o_proj"])


def _feed_forward(
    config: ModelConfig, weights: Weights, layer_idx: int, x: torch.Tensor, on_hidden: OnHidden | None
) -> tuple[torch.Tensor, Routing | None]:
    """x: [T, H] -> [T, H], and where its tokens went in a mixture."""
    mlp = f"layers.{layer_idx}.mlp"

    def one(expert_idx: int, rows: torch.Tensor) -> torch.Tensor:
        ffn = f"{mlp}.experts.{expert_idx}" if config.num_experts else mlp
        gate = functional.linear(rows, weights[f"{ffn}.gate_proj"])
        up = functional.linear(rows, weights[f"{ffn}.up_proj"])
        hidden = activate(config.activation, gate, up)
        if on_hidden is not None:
            hidden = on_hidden(layer_idx, expert_idx, hidden)
        return functional.linear(hidden, weights[f"{ffn}.down_proj"])

    if not config.num_experts:
        return one(0, x), None
    routing = route(x, weights[f"{mlp}.router"], config.num_experts_per_tok)
    return mix_experts(x, routing, config.num_experts, one), routing
