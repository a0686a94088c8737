"""Llama and its sparse descendants: ReluLLaMA, ProSparse (`sparsellama`), Sakana's SparseLM, ungated Arcee."""

from __future__ import annotations

from hybrid_kernels.activation import Activation
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.families.family import DENSE_RENAMES, Family, parse_llama_like
from hybrid_runtime.families.raw_config import RawConfig


def _parse(raw: RawConfig, activation: Activation) -> ModelConfig:
    attention_bias = raw.boolean("attention_bias", default=False)
    return parse_llama_like(
        raw,
        activation,
        "llama",
        norm_eps=raw.number("rms_norm_eps", 1e-5 if raw.values.get("model_type") == "arcee" else 1e-6),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=raw.boolean("mlp_bias", default=False),
    )


LLAMA = Family("llama", ("llama", "sparsellama", "llama_sparse_relu", "arcee"), _parse, DENSE_RENAMES, "silu")
