"""A trained model as a Hugging Face folder, with the names of the family whose arithmetic it computes.

    swiglu    mixtral, llama (mistral where there is a window); transformers loads these
    relu      the same with hidden_act relu; so does transformers
    fatrelu   mixtral with hidden_act fatrelu; ProSparse's sparsellama
    drelu     TurboSparse-Mixtral's names without predictors; Bamboo's

The folder reads as the published models read, so nothing after it knows that the model was trained here.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import UsageError
from hybrid_runtime.tensor_files import write_tensors
from hybrid_tools.training.json_files import write_json
from hybrid_tools.training.vocabulary import TOKENIZER_FILES

WEIGHTS_FILE = "model.safetensors"
NOTES_FILE = "training.json"
_HIDDEN_ACT = {"silu_glu": "silu", "relu_glu": "relu", "drelu": "relu", "fatrelu": "fatrelu"}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "sparsellama": "SparseLlamaForCausalLM",
    "bamboo": "BambooForCausalLM",
    "turbosparsemixtral": "TurboSparseMixtralForCausalLM",
}
_EXPERT_MATRICES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def write_model(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, torch.Tensor],
    tokenizer_folder: Path,
    notes: Mapping[str, object],
) -> None:
    """Write model.safetensors, the tokenizer, training.json (notes on where it comes from), and config.json last.

    weights: all in one dtype, which the folder keeps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file():
            shutil.copyfile(tokenizer_folder / name, folder / name)
    (dtype,) = {weight.dtype for weight in weights.values()}
    published = {published_name(name): weight.detach().cpu().contiguous() for name, weight in weights.items()}
    values = published_config(config, dtype)
    (folder / "config.json").unlink(missing_ok=True)  # a folder without one is not whole
    write_tensors(folder / WEIGHTS_FILE, published, {"format": "pt"})
    write_json(folder / NOTES_FILE, notes)
    write_json(folder / "config.json", values)


def is_whole(folder: Path, tokenizer_folder: Path) -> bool:
    """Whether everything that write_model writes is there, the weights as long as their header says."""
    names = [name for name in TOKENIZER_FILES if (tokenizer_folder / name).is_file()]
    if not all((folder / name).is_file() for name in (*names, NOTES_FILE, "config.json")):
        return False
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def published_name(canonical: str) -> str:
    """`layers.0.mlp.experts.1.up_proj` -> `model.layers.0.block_sparse_moe.experts.1.w3.weight`."""
    if canonical == "lm_head":
        return "lm_head.weight"
    expert = re.fullmatch(r"(layers\.\d+)\.mlp\.experts\.(\d+)\.(\w+)", canonical)
    if expert:
        layer, idx, matrix = expert.groups()
        return f"model.{layer}.block_sparse_moe.experts.{idx}.{_EXPERT_MATRICES[matrix]}.weight"
    return f"model.{canonical.replace('.mlp.router', '.block_sparse_moe.gate')}.weight"


def published_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, object]:
    """config.json. Raise UsageError for a decoder that no published family describes."""
    kind = config.activation.kind
    model_type = _model_type(config)
    if kind not in _HIDDEN_ACT or config.rope is None or config.rope.kind != "default":
        raise UsageError(f"a {config.family} model with {kind} or scaled positions has no published form here")
    if len(set(config.sliding_windows)) > 1 or (config.sliding_windows and model_type == "sparsellama"):
        raise UsageError(
            f"a {config.family} model with {kind} and windows {config.sliding_windows} has no published form"
        )
    values: dict[str, object] = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "hidden_act": _HIDDEN_ACT[kind],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0] if len(config.eos_token_ids) == 1 else list(config.eos_token_ids),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if kind == "fatrelu":
        values["hidden_act_param"] = config.activation.threshold
    if model_type in ("mistral", "mixtral", "bamboo", "turbosparsemixtral"):
        values["sliding_window"] = config.window(0)
    if config.num_experts:
        values["num_local_experts"] = config.num_experts
        values["num_experts_per_tok"] = config.num_experts_per_tok
    return values


def _model_type(config: ModelConfig) -> str:
    kind = config.activation.kind
    if kind == "drelu":
        return "turbosparsemixtral" if config.num_experts else "bamboo"
    if config.num_experts:
        return "mixtral"
    if config.sliding_windows and kind != "fatrelu":
        return "mistral"
    return "sparsellama" if kind == "fatrelu" else "llama"
