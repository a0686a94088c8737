"""OPT: LayerNorm with biases, learned positions (row = position + 2), one ungated FFN with biases, tied embeddings."""

from __future__ import annotations

from hybrid_kernels.activation import Activation
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import UnsupportedModel
from hybrid_runtime.families.family import Family
from hybrid_runtime.families.raw_config import RawConfig

POSITION_OFFSET = 2
NORM_EPS = 1e-5  # torch.nn.LayerNorm's default, which OPT never overrides

_RENAMES: tuple[tuple[str, str], ...] = tuple(
    (r"(?:model\.)?" + pattern, replacement)
    for pattern, replacement in (
        (r"lm_head\.weight", "lm_head"),
        (r"decoder\.(embed_tokens|embed_positions)\.weight", r"\1"),
        (r"decoder\.final_layer_norm\.weight", "norm"),
        (r"decoder\.final_layer_norm\.bias", "norm.bias"),
        (r"decoder\.(layers\.\d+)\.self_attn_layer_norm\.weight", r"\1.input_layernorm"),
        (r"decoder\.(layers\.\d+)\.self_attn_layer_norm\.bias", r"\1.input_layernorm.bias"),
        (r"decoder\.(layers\.\d+)\.final_layer_norm\.weight", r"\1.post_attention_layernorm"),
        (r"decoder\.(layers\.\d+)\.final_layer_norm\.bias", r"\1.post_attention_layernorm.bias"),
        (r"decoder\.(layers\.\d+\.self_attn\.[qkv]_proj)\.weight", r"\1"),
        (r"decoder\.(layers\.\d+\.self_attn\.[qkv]_proj\.bias)", r"\1"),
        (r"decoder\.(layers\.\d+)\.self_attn\.out_proj\.weight", r"\1.self_attn.o_proj"),
        (r"decoder\.(layers\.\d+)\.self_attn\.out_proj\.bias", r"\1.self_attn.o_proj.bias"),
        (r"decoder\.(layers\.\d+)\.fc1\.weight", r"\1.mlp.up_proj"),
        (r"decoder\.(layers\.\d+)\.fc1\.bias", r"\1.mlp.up_proj.bias"),
        (r"decoder\.(layers\.\d+)\.fc2\.weight", r"\1.mlp.down_proj"),
        (r"decoder\.(layers\.\d+)\.fc2\.bias", r"\1.mlp.down_proj.bias"),
    )
)


def _parse(raw: RawConfig, activation: Activation) -> ModelConfig:
    hidden_size, num_heads = raw.integer("hidden_size"), raw.integer("num_attention_heads")
    if raw.integer("word_embed_proj_dim", hidden_size) != hidden_size:
        raise UnsupportedModel(f"{raw.file}: word_embed_proj_dim other than hidden_size (OPT-350m) is not supported")
    for key in ("do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine"):
        if not raw.boolean(key, default=True):
            raise UnsupportedModel(f"{raw.file}: {key} false is not supported")
    if raw.boolean("_remove_final_layer_norm", default=False):
        raise UnsupportedModel(f"{raw.file}: _remove_final_layer_norm true is not supported")
    if hidden_size % num_heads:
        raise raw.error("hidden_size", hidden_size, f"a multiple of num_attention_heads {num_heads}")
    return ModelConfig(
        family="opt",
        vocab_size=raw.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=raw.integer("ffn_dim"),
        num_hidden_layers=raw.integer("num_hidden_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=raw.integer("max_position_embeddings"),
        activation=activation,
        norm="layer",
        norm_eps=NORM_EPS,
        learned_position_offset=POSITION_OFFSET,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_word_embeddings=raw.boolean("tie_word_embeddings", default=True),
        bos_token_id=next(iter(raw.token_ids("bos_token_id")), None),
        eos_token_ids=raw.token_ids("eos_token_id"),
    )


OPT = Family("opt", ("opt",), _parse, _RENAMES, "relu", activation_key="activation_function")
