"""PowerInfer's predictors: model_0.pt, model_1.pt, ..., each a state dict with fc1.weight [r, H] and fc2.weight [I, r].

Their config.json may give `sparse_threshold`. They read the stream before the FFN's norm (reference: powerinfer's
llama.cpp, build_llama), and there is one a layer: mixtures are not among them.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import CheckpointError, UnsupportedModel
from hybrid_runtime.store.predictor_files import MOST_RANK, LowRank
from hybrid_runtime.strict_json import parse_json_object
from hybrid_tools.torch_files import read_torch_file

_FILE = re.compile(r"model_(\d+)\.pt")
NAMES = ("fc1.weight", "fc2.weight")


def predictor_files(folder: Path, config: ModelConfig) -> list[Path]:
    """The layers' files in the order of their numbers. Raise CheckpointError naming what is missing or too many."""
    if config.num_experts:
        raise UnsupportedModel(f"{folder}: PowerInfer has predictors for dense models, this one has experts")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    found = {int(match[1]): path for path in folder.iterdir() if (match := _FILE.fullmatch(path.name))}
    expected = set(range(config.num_hidden_layers))
    if set(found) != expected:
        wrong = ", ".join(f"model_{idx}.pt" for idx in sorted(expected ^ set(found))[:3])
        raise CheckpointError(
            f"{folder}: lacks or adds {wrong}; expected model_0.pt to model_{config.num_hidden_layers - 1}.pt"
        )
    return [found[layer_idx] for layer_idx in sorted(found)]


def read_predictor(path: Path, config: ModelConfig) -> LowRank:
    """fc1 [rank, H] and fc2 [I, rank], float. Raise CheckpointError for other names, shapes or types."""
    hidden, neurons = config.hidden_size, config.intermediate_size
    values = read_torch_file(path, most_bytes=4 * MOST_RANK * (hidden + neurons))
    if not isinstance(values, dict) or set(values) != set(NAMES):
        raise CheckpointError(f"{path}: does not hold {' and '.join(NAMES)}; it is no predictor of PowerInfer's")
    fc1, fc2 = (values[name] for name in NAMES)
    for name, matrix in values.items():
        if not isinstance(matrix, torch.Tensor) or not matrix.is_floating_point() or matrix.dim() != 2:
            raise CheckpointError(f"{path}: {name} is no matrix of floating-point numbers")
        if not torch.isfinite(matrix).all():
            raise CheckpointError(f"{path}: {name} holds NaN or Inf; fetch it again")
    if fc1.shape[1] != hidden or fc2.shape[0] != neurons or fc1.shape[0] != fc2.shape[1]:
        raise CheckpointError(
            f"{path}: fc1 is {tuple(fc1.shape)} and fc2 {tuple(fc2.shape)}, expected (rank, {hidden}) and "
            f"({neurons}, rank); it is of another model"
        )
    return fc1, fc2


def read_threshold(folder: Path) -> float:
    """`sparse_threshold` of the folder's config.json, or 0."""
    path = folder / "config.json"
    if not path.is_file():
        return 0.0
    value = parse_json_object(path.read_bytes(), str(path)).get("sparse_threshold", 0.0)
    if type(value) not in (int, float):
        raise CheckpointError(f"{path}: sparse_threshold is {value!r}, expected a number")
    return float(value)  # type: ignore[arg-type]  # seen to be one
