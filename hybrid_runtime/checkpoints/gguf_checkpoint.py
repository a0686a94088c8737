"""A GGUF file (llama.cpp) or a PWRI file (PowerInfer): its metadata put in config.json's words, its tensors in ours.

Architecture `llama` stores q and k with rotary pairs as neighbours, so their rows are reordered on reading; `qwen2`
does not. A mixture's experts may be stacked in one tensor or lie in one each. PWRI files carry transposed down
projections and, as fc1 and fc2, PowerInfer's predictors, which read the residual before the FFN's norm and are an
optimisation there, not a part of the model; their FFNs are ReLU whatever the architecture's name says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from hybrid_runtime.checkpoints.checkpoint import Checkpoint, expert_slices
from hybrid_runtime.checkpoints.gguf_file import GgufFile, open_gguf
from hybrid_runtime.checkpoints.tensor_file import TensorInfo, read_rows
from hybrid_runtime.config import ModelConfig, RopeConfig
from hybrid_runtime.errors import CheckpointError, UnsupportedModel
from hybrid_runtime.families.activations import refuse_silent_guess
from hybrid_runtime.families.raw_config import RawConfig
from hybrid_runtime.families.registry import parse_config

ARCHITECTURES = ("llama", "qwen2", "bamboo")
INTERLEAVED = ("llama", "bamboo")

_GLOBAL_NAMES = {"token_embd.weight": "embed_tokens", "output_norm.weight": "norm", "output.weight": "lm_head"}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm",
    "attn_q.weight": "self_attn.q_proj",
    "attn_k.weight": "self_attn.k_proj",
    "attn_v.weight": "self_attn.v_proj",
    "attn_output.weight": "self_attn.o_proj",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.bias": "self_attn.o_proj.bias",
    "ffn_norm.weight": "post_attention_layernorm",
    "ffn_gate.weight": "mlp.gate_proj",
    "ffn_up.weight": "mlp.up_proj",
    "ffn_down.weight": "mlp.down_proj",
    "ffn_down_t.weight": "mlp.down_proj",
    "ffn_gate_inp.weight": "mlp.router",
    "fc1.weight": "mlp.predictor.fc1",
    "fc2.weight": "mlp.predictor.fc2",
}
_STACKED = re.compile(r"ffn_(gate|up|down)_exps\.weight")
_EXPERT = re.compile(r"ffn_(gate|up|down)\.(\d+)\.weight")
_ROPE_FACTORS = "rope_freqs.weight"
_SCALING_KEYS = (
    ".type",
    ".factor",
    ".original_context_length",
    ".finetuned",
    ".attn_factor",
    ".yarn_beta_fast",
    ".yarn_beta_slow",
)


def open_gguf_checkpoint(path: Path, *, repo_id: str = "", ffn_activation: str | None = None) -> Checkpoint:
    """Raise CheckpointError (or UnsupportedModel) naming what is broken, missing, unknown or contradictory."""
    file = open_gguf(path)
    raw, architecture = _raw_config(file)
    if file.magic == "GGUF" and architecture != "bamboo":
        names = (file.metadata.get("general.name"), file.metadata.get("general.basename"), path.name, repo_id)
        refuse_silent_guess(str(path), names, ffn_activation)
    config = parse_config(raw, repo_id=repo_id, ffn_activation=ffn_activation)
    tensors = _by_canonical_name(file)
    config = _settle(config, file, tensors)
    interleaved = dict(_interleaved_heads(config)) if architecture in INTERLEAVED else {}
    return Checkpoint(
        path,
        config,
        tensors,
        interleaved,
        down_is_transposed=any(name.endswith("ffn_down_t.weight") for name in file.tensors),
        gguf_metadata=file.metadata,
    )


def _raw_config(file: GgufFile) -> tuple[RawConfig, str]:
    """The metadata as the config.json that it was made from."""
    metadata = RawConfig(file.metadata, str(file.path))
    architecture = metadata.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{file.path}: general.architecture {architecture!r} is not supported "
            f"(supported: {', '.join(ARCHITECTURES)})"
        )
    keys = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "rope_theta": "rope.freq_base",
        "sliding_window": "attention.sliding_window",
        "num_local_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
    }
    values = {ours: file.metadata.get(f"{architecture}.{theirs}") for ours, theirs in keys.items()}
    if not values["num_local_experts"]:
        values["num_local_experts"] = None
    embedding = file.tensors.get("token_embd.weight")
    values["vocab_size"] = embedding.shape[0] if embedding else file.metadata.get(f"{architecture}.vocab_size")
    values["model_type"] = _model_type(architecture, values)
    values["hidden_act"] = "relu" if file.magic == "PWRI" or architecture == "bamboo" else "silu"
    values["tie_word_embeddings"] = "output.weight" not in file.tensors
    values["bos_token_id"] = file.metadata.get("tokenizer.ggml.bos_token_id")
    values["eos_token_id"] = file.metadata.get("tokenizer.ggml.eos_token_id")
    values["rope_scaling"] = _rope_scaling(metadata, architecture)
    return RawConfig(values, str(file.path)), architecture


def _model_type(architecture: str, values: Mapping[str, object]) -> str:
    if architecture != "llama":
        return architecture
    if values["num_local_experts"] is not None:
        return "mixtral"
    return "llama" if values["sliding_window"] is None else "mistral"


def _rope_scaling(metadata: RawConfig, architecture: str) -> dict[str, object] | None:
    prefix = f"{architecture}.rope.scaling"
    unknown = [
        key for key in metadata.values if key.startswith(prefix) and key.removeprefix(prefix) not in _SCALING_KEYS
    ]
    if unknown:
        raise UnsupportedModel(f"{metadata.file}: {', '.join(sorted(unknown))}: not supported")
    kind = metadata.text(f"{prefix}.type", "none")
    factor = metadata.number(f"{prefix}.factor", metadata.number(f"{architecture}.rope.scale_linear", 1.0))
    if kind == "none" and factor != 1.0:
        kind = "linear"
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UnsupportedModel(f"{metadata.file}: {prefix}.type {kind!r} is not supported (known: none, linear, yarn)")
    scaling: dict[str, object] = {"rope_type": kind, "factor": factor}
    scaling["original_max_position_embeddings"] = metadata.values.get(f"{prefix}.original_context_length")
    scaling["beta_fast"] = metadata.values.get(f"{prefix}.yarn_beta_fast")
    scaling["beta_slow"] = metadata.values.get(f"{prefix}.yarn_beta_slow")
    if kind == "yarn" and metadata.has(f"{prefix}.attn_factor"):  # llama.cpp multiplies with the paper's own
        extra = metadata.number(f"{prefix}.attn_factor")
        scaling["attention_factor"] = extra * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    return scaling


def _by_canonical_name(file: GgufFile) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for name, info in _canonical_tensors(file):
        if name in tensors:
            raise CheckpointError(f"{file.path}: tensors {tensors[name].name} and {info.name} are both {name}")
        tensors[name] = info
    return tensors


def _canonical_tensors(file: GgufFile) -> Iterator[tuple[str, TensorInfo]]:
    for name, info in file.tensors.items():
        if name in _GLOBAL_NAMES:
            yield _GLOBAL_NAMES[name], info
        elif name == _ROPE_FACTORS:
            continue  # becomes a part of the configuration
        else:
            yield from _layer_tensors(file.path, name, info)


def _layer_tensors(path: Path, name: str, info: TensorInfo) -> Iterator[tuple[str, TensorInfo]]:
    match = re.fullmatch(r"blk\.(\d{1,4})\.(.+)", name)
    if match is None:
        raise CheckpointError(f"{path}: tensor {name} is of no supported architecture; refusing to ignore it")
    layer, rest = f"layers.{int(match[1])}", match[2]
    if rest in _LAYER_NAMES:
        yield f"{layer}.{_LAYER_NAMES[rest]}", info
    elif stacked := _STACKED.fullmatch(rest):
        if len(info.shape) != 3:
            raise CheckpointError(f"{path}: tensor {name} has shape {list(info.shape)}, expected three dimensions")
        for expert_idx, expert in enumerate(expert_slices(info)):
            yield f"{layer}.mlp.experts.{expert_idx}.{stacked[1]}_proj", expert
    elif single := _EXPERT.fullmatch(rest):
        yield f"{layer}.mlp.experts.{int(single[2])}.{single[1]}_proj", info
    elif rest not in ("attn_rot_embd", "rope_freqs.weight"):  # tables that follow from the configuration
        raise CheckpointError(f"{path}: tensor {name} is of no supported architecture; refusing to ignore it")


def _settle(config: ModelConfig, file: GgufFile, tensors: Mapping[str, TensorInfo]) -> ModelConfig:
    """What only the tensors and PowerInfer's own keys say."""
    config = replace(config, rope=_settle_rope(config, file))
    qkv_bias = "layers.0.self_attn.q_proj.bias" in tensors
    output_bias = "layers.0.self_attn.o_proj.bias" in tensors
    has_predictor = any(".predictor." in name for name in tensors)
    raw = RawConfig(file.metadata, str(file.path))
    rotated = raw.integer(f"{raw.text('general.architecture')}.rope.dimension_count", config.head_dim)
    if rotated != config.head_dim:
        raise UnsupportedModel(
            f"{file.path}: rope.dimension_count {rotated}, only head_dim {config.head_dim} is supported"
        )
    return replace(
        config,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        predictor_input="pre_norm" if has_predictor else None,
        predictor_is_part_of_model=False,
        predictor_threshold=_just_below(raw.number("powerinfer.sparse_threshold", 0.0)),
    )


def _just_below(threshold: float) -> float:
    """PowerInfer computes a neuron from its threshold on (>=), our predictor above its own (>)."""
    below = torch.tensor(threshold, dtype=torch.float32)
    return torch.nextafter(below, torch.tensor(-math.inf)).item()


def _settle_rope(config: ModelConfig, file: GgufFile) -> RopeConfig | None:
    """llama3's scaling lies in a tensor of factors, one a frequency."""
    info = file.tensors.get(_ROPE_FACTORS)
    if info is None or config.rope is None:
        return config.rope
    if config.rope.kind != "default":
        raise UnsupportedModel(f"{file.path}: rope scaling {config.rope.kind} together with {_ROPE_FACTORS}")
    factors = tuple(float(each) for each in read_rows(info).flatten().tolist())
    if len(factors) != config.head_dim // 2 or not all(each > 0 for each in factors):
        raise CheckpointError(
            f"{file.path}: tensor {_ROPE_FACTORS} has {len(factors)} factors, expected {config.head_dim // 2} above 0"
        )
    return RopeConfig(config.rope.theta, "factors", short_factor=factors)


def _interleaved_heads(config: ModelConfig) -> Iterator[tuple[str, int]]:
    for layer_idx in range(config.num_hidden_layers):
        attention = f"layers.{layer_idx}.self_attn"
        yield f"{attention}.q_proj", config.num_attention_heads
        yield f"{attention}.k_proj", config.num_key_value_heads
        if config.qkv_bias:
            yield f"{attention}.q_proj.bias", config.num_attention_heads
            yield f"{attention}.k_proj.bias", config.num_key_value_heads
