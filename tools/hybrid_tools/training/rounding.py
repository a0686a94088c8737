"""Weights on the levels of a quantised store, so that the store loses almost nothing of the model that was published.

A q8 store rounds each group of columns to 255 levels. Where the published weights are such levels already, in bf16, all
that is left between the two is bf16's own rounding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hybrid_kernels.quantization.op import dequantize_rows, quantize_rows
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import NumericsError
from hybrid_runtime.model.weight_specs import all_weights
from hybrid_runtime.store.layout import Quantization


def rounded_weights(
    config: ModelConfig, weights: Mapping[str, torch.Tensor], row_format: RowFormat, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The weights (float32 by canonical name) as a store in row_format would give them back, in dtype.

    A store that is made of the result gives back exactly the result, rounded to dtype. That takes two passes: the
    first moves each group's largest weight to where dtype can hold it, so that the second finds the same levels again.
    Raise NumericsError naming a weight that is not finite, or too large for the format's scales.
    """
    quantization = Quantization(row_format)
    rounded = {}
    for spec in all_weights(config):
        weight = weights[spec.name].detach().float()
        if spec.role not in ("vector", "router"):
            is_transposed = spec.name.endswith(".down_proj")  # a store keeps that neuron by neuron
            for _ in range(2):
                rows = weight.T if is_transposed else weight
                rows = _restored(spec.name, rows, quantization.format_of(spec.role)).to(dtype).float()
                weight = rows.T if is_transposed else rows
        rounded[spec.name] = weight.to(dtype)
    return rounded


def _restored(name: str, rows: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    try:
        packed = quantize_rows(rows.cpu().contiguous(), row_format)
    except ValueError as error:
        raise NumericsError(f"{name} cannot be rounded to {row_format}: {error}") from error
    return dequantize_rows(packed, rows.shape[1], row_format).to(rows.device)
