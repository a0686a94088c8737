"""Opening whatever a path names: a Hugging Face folder or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from hybrid_runtime.checkpoints.checkpoint import Checkpoint
from hybrid_runtime.checkpoints.gguf_checkpoint import open_gguf_checkpoint
from hybrid_runtime.checkpoints.hf_checkpoint import open_hf_folder
from hybrid_runtime.errors import CheckpointError, UsageError

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt"})


def open_checkpoint(path: Path, *, repo_id: str = "", ffn_activation: str | None = None) -> Checkpoint:
    """Raise CheckpointError or UsageError naming file and cause. repo_id: where the files came from, if known."""
    if path.is_dir():
        return open_hf_folder(path, repo_id=repo_id, ffn_activation=ffn_activation)
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    if path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(f"{path}: pickled weights are never loaded; convert them to safetensors elsewhere")
    if path.suffix == ".safetensors":
        raise UsageError(f"{path}: name the folder that holds config.json and the weights, not one of its files")
    return open_gguf_checkpoint(path, repo_id=repo_id, ffn_activation=ffn_activation)
