"""Putting predictors that lie beside a store into a model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hybrid_kernels.packed_matrix import PackedMatrix
from hybrid_kernels.quantization.op import quantize_rows
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_predictors.mlp import MlpPredictor
from hybrid_predictors.predictor import Predictor
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.model.weights import DecoderWeights
from hybrid_runtime.store.predictor_files import LowRank, PredictorHeader, read_layer


def load_predictors(folder: Path, header: PredictorHeader, config: ModelConfig) -> list[list[MlpPredictor]]:
    """By layer and expert, packed as the header says; one layer's weights are held unpacked at a time."""
    return [
        pack_layer(
            read_layer(folder / header.data, config, layer_idx, layer.rank),
            header.row_format,
            layer.threshold,
            has_relu=header.has_relu,
        )
        for layer_idx, layer in enumerate(header.layers)
    ]


def pack_layer(
    experts: Sequence[LowRank], row_format: RowFormat, threshold: float, *, has_relu: bool
) -> list[MlpPredictor]:
    """fc1 [rank, H] and fc2 [I, rank] of every expert as packed rows; an fc1 that all have in common is held once."""
    shared = _packed(experts[0][0], row_format)
    return [
        MlpPredictor(
            shared if torch.equal(fc1, experts[0][0]) else _packed(fc1, row_format),
            _packed(fc2, row_format),
            threshold,
            has_relu=has_relu,
        )
        for fc1, fc2 in experts
    ]


def with_predictors(weights: DecoderWeights, predictors: Sequence[Sequence[Predictor]]) -> DecoderWeights:
    """The same weights with these predictors, by layer and expert, in place of any of their own."""
    layers = tuple(
        replace(
            layer,
            experts=tuple(
                replace(expert, predictor=predictor) for expert, predictor in zip(layer.experts, of_layer, strict=True)
            ),
        )
        for layer, of_layer in zip(weights.layers, predictors, strict=True)
    )
    return replace(weights, layers=layers)


def _packed(matrix: torch.Tensor, row_format: RowFormat) -> PackedMatrix:
    return PackedMatrix(quantize_rows(matrix, row_format), matrix.shape[1], row_format).close_together()
