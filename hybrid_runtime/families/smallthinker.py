"""SmallThinker: ReLU-GLU experts, a router that reads the layer's raw input, and layers with or without positions."""

from __future__ import annotations

from hybrid_kernels.activation import Activation
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.families.family import LLAMA_RENAMES, Family, parse_llama_like
from hybrid_runtime.families.raw_config import RawConfig

_EXPERT = r"model\.(layers\.\d+)\.block_sparse_moe\.experts\.(\d+)"

_RENAMES: tuple[tuple[str, str], ...] = (
    *LLAMA_RENAMES,
    (r"model\.(layers\.\d+)\.block_sparse_moe\.primary_router\.weight", r"\1.mlp.router"),
    (_EXPERT + r"\.(gate|up|down)\.weight", r"\1.mlp.experts.\2.\3_proj"),
)


def _parse(raw: RawConfig, activation: Activation) -> ModelConfig:
    num_layers = raw.integer("num_hidden_layers")
    return parse_llama_like(
        raw,
        activation,
        "smallthinker",
        intermediate_size=raw.integer("moe_ffn_hidden_size"),
        rope_layers=raw.flags("rope_layout", num_layers) or (),
        sliding_windows=_windows(raw, num_layers),
        num_experts=raw.integer("moe_num_primary_experts"),
        num_experts_per_tok=raw.integer("moe_num_active_primary_experts"),
        router_score="topk_softmax"
        if raw.boolean("moe_primary_router_apply_softmax", default=False)
        else "topk_sigmoid",
        router_input="layer_input",
        normalize_expert_weights=raw.boolean("norm_topk_prob", default=True),
    )


def _windows(raw: RawConfig, num_layers: int) -> tuple[int | None, ...]:
    layout = raw.flags("sliding_window_layout", num_layers)
    if layout is None or not any(layout):
        return ()
    window = raw.integer("sliding_window_size")
    return tuple(window if slides else None for slides in layout)


SMALLTHINKER = Family("smallthinker", ("smallthinker",), _parse, _RENAMES, "relu")
