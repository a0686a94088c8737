"""A Hugging Face folder: config.json, and safetensors with or without an index."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hybrid_runtime.checkpoints.checkpoint import Checkpoint
from hybrid_runtime.checkpoints.file_reading import open_file
from hybrid_runtime.checkpoints.safetensors_folder import open_safetensors_folder
from hybrid_runtime.checkpoints.tensor_file import TensorInfo
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import CheckpointError, UnsupportedModel
from hybrid_runtime.families.family import IGNORED_TENSORS, Family
from hybrid_runtime.families.raw_config import RawConfig
from hybrid_runtime.families.registry import find_family, parse_config
from hybrid_runtime.strict_json import parse_json_object

LARGEST_CONFIG_BYTES = 16 << 20


def open_hf_folder(folder: Path, *, repo_id: str = "", ffn_activation: str | None = None) -> Checkpoint:
    """Raise CheckpointError (or UnsupportedModel) naming what is broken, missing, unknown or contradictory."""
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(f"{folder}: has no config.json; name a Hugging Face folder, a .gguf file or a store")
    raw = RawConfig(_read_config(config_path), str(config_path))
    if raw.has("quantization_config"):
        raise UnsupportedModel(f"{config_path}: quantization_config is not supported; use the unquantised checkpoint")
    family, _ = find_family(raw)
    config = parse_config(raw, repo_id=repo_id or _repo_id_of(folder, raw), ffn_activation=ffn_activation)
    tensors = _canonical_tensors(family, config, open_safetensors_folder(folder))
    return Checkpoint(folder, _settle_predictor(config, tensors, folder), tensors)


def _read_config(path: Path) -> dict[str, object]:
    with open_file(path) as file:
        if file.num_bytes > LARGEST_CONFIG_BYTES:
            raise CheckpointError(f"{path}: is {file.num_bytes} bytes, expected at most {LARGEST_CONFIG_BYTES}")
        return parse_json_object(file.read(0, file.num_bytes), str(path))


def _canonical_tensors(family: Family, config: ModelConfig, published: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for name, info in published.items():
        canonical = family.canonical_name(name)
        if canonical is None:
            if IGNORED_TENSORS.fullmatch(name):
                continue
            raise CheckpointError(
                f"{info.path}: tensor {name} is none of a {family.name} model's; refusing to ignore it"
            )
        if canonical == "lm_head" and config.tie_word_embeddings:
            continue  # a copy of the embedding that some exports write out
        if canonical in tensors:
            raise CheckpointError(f"{info.path}: tensor {name} and {tensors[canonical].name} are both {canonical}")
        tensors[canonical] = info
    return tensors


def _settle_predictor(config: ModelConfig, tensors: dict[str, TensorInfo], folder: Path) -> ModelConfig:
    """The tensors decide whether the predictor that a family may have is in this checkpoint."""
    if not any(".predictor." in name for name in tensors):
        return replace(config, predictor_input=None)
    if config.predictor_input is None:
        raise CheckpointError(f"{folder}: predictor tensors in a {config.family} model, whose code does not use any")
    return replace(config, predictor_is_part_of_model=True)


def _repo_id_of(folder: Path, raw: RawConfig) -> str:
    """The repository this folder came from: the hub cache's folder name, what its config remembers, or its own name."""
    for part in folder.absolute().parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return raw.text("_name_or_path", "") or folder.name
