"""Predictors that were trained for a store, or imported: a folder beside it.

    predictors.json                      what they are and how well they do; names the data folder; written last
    data-<id>/layer-<l>.safetensors      bfloat16, with the names of published checkpoints:
                                         model.layers.<l>.mlp.predictor.fc1.weight [rank, H], ....fc2.weight [I, rank];
                                         in a mixture model.layers.<l>.block_sparse_moe.experts.<e>.predictor....

They are packed into rows of the format that predictors.json names when they are loaded, like any weight.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch

from hybrid_kernels.quantization.row_format import RowFormat, RowKind
from hybrid_runtime.config import ModelConfig, StreamPoint
from hybrid_runtime.errors import CheckpointError
from hybrid_runtime.strict_json import parse_json_object
from hybrid_runtime.tensor_files import read_tensors, write_tensors
from hybrid_runtime.typed_json import from_json
from hybrid_runtime.whole_files import write_whole

FORMAT_NAME = "hybrid-runtime predictors"
FORMAT_VERSION = 1
PREDICTORS = "predictors.json"
PREDICTOR_FOLDER = "predictors"
REMEDY = "run hybrid-predictors train again"
MOST_RANK = 1 << 16


@dataclass(frozen=True, slots=True)
class LayerPredictors:
    """One layer's predictors, which share a rank and a threshold. recall, precision and the densities (shares of the
    neurons named, and of those that fire) are of tokens that were not trained on; None where nobody measured them.
    """

    rank: int
    threshold: float
    num_bytes: int
    recall: float | None = None
    precision: float | None = None
    predicted_density: float | None = None
    true_density: float | None = None


@dataclass(frozen=True, slots=True)
class PredictorHeader:
    """predictors.json. input: where they read a layer's stream; row_kind, row_group: how their rows are packed.

    perplexity, exact_perplexity: of the model with and without them, on text that nothing was trained on.
    """

    format: str
    version: int
    model: str
    model_digest: str
    source: str
    input: StreamPoint
    has_relu: bool
    row_kind: RowKind
    row_group: int
    layers: tuple[LayerPredictors, ...]
    perplexity: float | None
    exact_perplexity: float | None
    data: str

    @property
    def row_format(self) -> RowFormat:
        """How the rows are packed when they are loaded."""
        return RowFormat(self.row_kind, self.row_group)

    @property
    def num_bytes(self) -> int:
        """Of all predictors in memory."""
        return sum(layer.num_bytes for layer in self.layers)


LowRank = tuple[torch.Tensor, torch.Tensor]
"""fc1 [rank, H] and fc2 [I, rank] of one network."""


def published_prefix(config: ModelConfig, layer_idx: int, expert_idx: int) -> str:
    """What checkpoints call a network's predictor."""
    if config.num_experts:
        return f"model.layers.{layer_idx}.block_sparse_moe.experts.{expert_idx}.predictor"
    return f"model.layers.{layer_idx}.mlp.predictor"


def layer_path(data_folder: Path, layer_idx: int) -> Path:
    """Where a layer's weights lie."""
    return data_folder / f"layer-{layer_idx:05d}.safetensors"


def write_layer(data_folder: Path, config: ModelConfig, layer_idx: int, experts: Sequence[LowRank]) -> None:
    """One layer's weights. Raise BudgetError when the disk does not hold them."""
    tensors: dict[str, torch.Tensor] = {}
    for expert_idx, (fc1, fc2) in enumerate(experts):
        prefix = published_prefix(config, layer_idx, expert_idx)
        tensors |= {f"{prefix}.fc1.weight": fc1.bfloat16(), f"{prefix}.fc2.weight": fc2.bfloat16()}
    write_tensors(layer_path(data_folder, layer_idx), tensors, {"format": "pt"})


def read_layer(data_folder: Path, config: ModelConfig, layer_idx: int, rank: int) -> list[LowRank]:
    """One layer's weights, bfloat16, by expert. Raise CheckpointError for a damaged file, or one of another shape."""
    prefixes = [published_prefix(config, layer_idx, idx) for idx in range(max(1, config.num_experts))]
    expected: dict[str, tuple[tuple[int | None, ...], torch.dtype]] = {}
    for prefix in prefixes:
        expected |= {
            f"{prefix}.fc1.weight": ((rank, config.hidden_size), torch.bfloat16),
            f"{prefix}.fc2.weight": ((config.intermediate_size, rank), torch.bfloat16),
        }
    tensors = read_tensors(layer_path(data_folder, layer_idx), expected, REMEDY)
    return [(tensors[f"{prefix}.fc1.weight"], tensors[f"{prefix}.fc2.weight"]) for prefix in prefixes]


def write_header(folder: Path, header: PredictorHeader) -> None:
    """Make the data folder that the header names the one that counts, and forget others."""
    write_whole(folder / PREDICTORS, (json.dumps(asdict(header), indent=1) + "\n").encode())
    for other in folder.glob("data-*"):
        if other.name != header.data:
            shutil.rmtree(other, ignore_errors=True)


def has_predictors(folder: Path) -> bool:
    """Whether there are finished ones."""
    return (folder / PREDICTORS).is_file()


def read_header(folder: Path, config: ModelConfig, model_digest: str | None = None) -> PredictorHeader:
    """Raise CheckpointError for a folder without predictors, with another version's, or another model's.

    model_digest: of the store that they must be of; None: any of the same shape.
    """
    path = folder / PREDICTORS
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {PREDICTORS}; {REMEDY}")
    values = parse_json_object(path.read_bytes(), str(path), remedy=REMEDY)
    if values.get("format") != FORMAT_NAME or values.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: is {values.get('format')!r} version {values.get('version')!r}, expected {FORMAT_NAME!r} version "
            f"{FORMAT_VERSION}; {REMEDY}"
        )
    try:
        header = from_json(PredictorHeader, values, PREDICTORS)
        header.row_format  # noqa: B018  # checks itself
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; {REMEDY}") from error
    _check(header, path, config)
    if model_digest is not None and header.model_digest != model_digest:
        raise CheckpointError(
            f"{path}: is of {header.model}, store {header.model_digest[:12]}, expected {model_digest[:12]}; "
            f"the model was converted anew since: {REMEDY}"
        )
    return header


def _check(header: PredictorHeader, path: Path, config: ModelConfig) -> None:
    if not re.fullmatch(r"data-[0-9a-f]{16}", header.data):
        raise CheckpointError(f"{path}: data is {header.data!r}, expected data-<16 hex digits>; {REMEDY}")
    if len(header.layers) != config.num_hidden_layers:
        raise CheckpointError(
            f"{path}: has {len(header.layers)} layers, the model {config.num_hidden_layers}; {REMEDY}"
        )
    if header.input not in get_args(StreamPoint):
        raise CheckpointError(f"{path}: input is {header.input!r}, expected one of {get_args(StreamPoint)}; {REMEDY}")
    for layer_idx, layer in enumerate(header.layers):
        if not 1 <= layer.rank <= MOST_RANK:
            raise CheckpointError(
                f"{path}: layer {layer_idx} has rank {layer.rank}, expected 1 to {MOST_RANK}; {REMEDY}"
            )
