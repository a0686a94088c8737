"""Mixtral, and TurboSparse-Mixtral: the same names, dReLU experts, each with its own predictor on the normed input.

A predictor's rank differs from layer to layer and is nowhere in config.json: it is read off fc1's shape.
"""

from __future__ import annotations

from hybrid_kernels.activation import Activation
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.families.family import LLAMA_RENAMES, Family, every_layer_window, parse_llama_like
from hybrid_runtime.families.raw_config import RawConfig
from hybrid_runtime.families.rope import parse_rope

DEFAULT_THETA = 1e6
_EXPERT = r"model\.(layers\.\d+)\.block_sparse_moe\.experts\.(\d+)"

MIXTRAL_RENAMES: tuple[tuple[str, str], ...] = (
    *LLAMA_RENAMES,
    (r"model\.(layers\.\d+)\.block_sparse_moe\.gate\.weight", r"\1.mlp.router"),
    (_EXPERT + r"\.w1\.weight", r"\1.mlp.experts.\2.gate_proj"),
    (_EXPERT + r"\.w3\.weight", r"\1.mlp.experts.\2.up_proj"),
    (_EXPERT + r"\.w2\.weight", r"\1.mlp.experts.\2.down_proj"),
    (_EXPERT + r"\.predictor\.(fc[12])\.weight", r"\1.mlp.experts.\2.predictor.\3"),
)


def _parse(raw: RawConfig, activation: Activation) -> ModelConfig:
    return _parse_mixture(raw, activation, "mixtral")


def _parse_turbosparse(raw: RawConfig, activation: Activation) -> ModelConfig:
    return _parse_mixture(raw, activation, "turbosparsemixtral", predictor_input="post_norm")


def _parse_mixture(raw: RawConfig, activation: Activation, family: str, **differences: object) -> ModelConfig:
    return parse_llama_like(
        raw,
        activation,
        family,
        norm_eps=raw.number("rms_norm_eps", 1e-5),
        rope=parse_rope(raw, DEFAULT_THETA),
        sliding_windows=every_layer_window(raw),
        num_experts=raw.integer("num_local_experts"),
        num_experts_per_tok=raw.integer("num_experts_per_tok"),
        **differences,
    )


MIXTRAL = Family("mixtral", ("mixtral",), _parse, MIXTRAL_RENAMES, "silu")
TURBOSPARSE_MIXTRAL = Family("turbosparsemixtral", ("turbosparsemixtral",), _parse_turbosparse, MIXTRAL_RENAMES)
