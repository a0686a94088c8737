"""One layer on the GPU: its weights there, and what is computed with them before any neuron is.

Every function only launches kernels: nothing asks the device for a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hybrid_kernels.attention.gpu import LayerCache, attention
from hybrid_kernels.linear.gpu import MOST_VECTORS, linear
from hybrid_kernels.norm.gpu import layer_norm, rms_norm
from hybrid_kernels.packed_matrix import PackedMatrix
from hybrid_kernels.rope.gpu import rotate_and_append
from hybrid_kernels.routing.gpu import route
from hybrid_kernels.tiers.gpu import ExpertMatrices, expert_linear
from hybrid_predictors.mlp import MlpPredictor
from hybrid_runtime.config import ModelConfig, StreamPoint
from hybrid_runtime.gpu.rotation import Rotation
from hybrid_runtime.model.weights import DecoderLayer, Norm, Projection


@dataclass(frozen=True, slots=True)
class GpuPredictor:
    """A layer's predictors. shares_fc1: whether all have the same fc1, which is there once."""

    fc1: ExpertMatrices
    fc2: ExpertMatrices
    shares_fc1: bool
    threshold: float
    has_relu: bool


@dataclass(frozen=True, slots=True)
class GpuLayer:
    """A layer whose attention is on the GPU. weights: norms, projections and router there, and no experts; predictor:
    where predictors rule neurons out.
    """

    layer_idx: int
    weights: DecoderLayer
    predictor: GpuPredictor | None


@dataclass(frozen=True, slots=True)
class Taps:
    """Of the residual stream, float32 [T, H] each: where the layer begins, after attention, and that after its norm."""

    layer_input: torch.Tensor
    pre_norm: torch.Tensor
    post_norm: torch.Tensor

    def at(self, point: StreamPoint) -> torch.Tensor:
        """By its name."""
        return {"layer_input": self.layer_input, "pre_norm": self.pre_norm, "post_norm": self.post_norm}[point]


def make_gpu_layer(layer_idx: int, layer: DecoderLayer, device: torch.device, *, masks: bool) -> GpuLayer:
    """What is not there yet is copied. masks: whether predictors rule neurons out."""
    weights = DecoderLayer(
        norm_there(layer.input_layernorm, device),
        _projection(layer.q_proj, device),
        _projection(layer.k_proj, device),
        _projection(layer.v_proj, device),
        _projection(layer.o_proj, device),
        norm_there(layer.post_attention_layernorm, device),
        None if layer.router is None else matrix_there(layer.router, device),
        experts=(),
    )
    return GpuLayer(layer_idx, weights, _predictor(layer, device) if masks else None)


def attend(
    config: ModelConfig,
    layer: GpuLayer,
    x: torch.Tensor,
    positions: torch.Tensor,
    rotation: Rotation | None,
    cache: LayerCache,
) -> Taps:
    """x: float32 [T, H]; positions: int32 [T]. Appends to the cache; T as many as `linear` takes."""
    weights = layer.weights
    normed = apply_norm(config, weights.input_layernorm, x)
    query, keys, values = (
        linear(normed, projection.weight, projection.bias).view(len(x), -1, config.head_dim)
        for projection in (weights.q_proj, weights.k_proj, weights.v_proj)
    )
    turns = rotation if config.rotates(layer.layer_idx) else None
    rotate_and_append(query, keys, values, turns, positions, cache)
    mixed = attention(query, cache, positions, config.window(layer.layer_idx))  # [T, heads, D]
    middle = x + linear(mixed.view(len(x), -1), weights.o_proj.weight, weights.o_proj.bias)
    return Taps(x, middle, apply_norm(config, weights.post_attention_layernorm, middle))


def choose_experts(config: ModelConfig, layer: GpuLayer, taps: Taps) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [T * k] and their weights, float32 [T * k]; of a dense layer its only network, with weight 1."""
    num_tokens, device, router = len(taps.post_norm), taps.post_norm.device, layer.weights.router
    if router is None:
        return torch.zeros(num_tokens, dtype=torch.int32, device=device), torch.ones(num_tokens, device=device)
    logits = torch.cat([linear(some, router) for some in torch.split(taps.at(config.router_input), MOST_VECTORS)])
    experts, weights = route(
        logits, config.num_experts_per_tok, config.router_score, normalize=config.normalize_expert_weights
    )
    return experts.view(-1), weights.view(-1)


def predict(predictor: GpuPredictor, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """x: float32 [T, H]; experts: int32 [P] -> logits, float32 [P, I]."""
    first = torch.zeros(len(x), dtype=torch.int32, device=x.device) if predictor.shares_fc1 else experts
    hidden = expert_linear(x, predictor.fc1, first, has_relu=predictor.has_relu)
    return expert_linear(hidden, predictor.fc2, experts)


def apply_norm(config: ModelConfig, norm: Norm, x: torch.Tensor) -> torch.Tensor:
    """x: float32 [T, H]."""
    if config.norm == "rms":
        return rms_norm(x, norm.weight, config.norm_eps)
    assert norm.bias is not None
    return layer_norm(x, norm.weight, norm.bias, config.norm_eps)


def norm_there(norm: Norm, device: torch.device) -> Norm:
    """The same on the device."""
    return Norm(norm.weight.to(device), None if norm.bias is None else norm.bias.to(device))


def matrix_there(matrix: PackedMatrix, device: torch.device) -> PackedMatrix:
    """The same on the device."""
    return replace(matrix, rows=matrix.rows.to(device))


def _projection(projection: Projection, device: torch.device) -> Projection:
    bias = None if projection.bias is None else projection.bias.to(device)
    return Projection(matrix_there(projection.weight, device), bias)


def _predictor(layer: DecoderLayer, device: torch.device) -> GpuPredictor:
    predictors: list[MlpPredictor] = layer.low_rank_predictors()
    first = [predictor.fc1 for predictor in predictors]
    shares = len(predictors) > 1 and all(each.rows.data_ptr() == first[0].rows.data_ptr() for each in first)
    biases = [predictor.bias for predictor in predictors if predictor.bias is not None]
    bias = torch.stack(biases).to(device) if len(biases) == len(predictors) else None
    return GpuPredictor(
        expert_matrices(first[:1] if shares else first, device),
        expert_matrices([each.fc2 for each in predictors], device, bias),
        shares,
        predictors[0].threshold,
        predictors[0].has_relu,
    )


def expert_matrices(
    matrices: Sequence[PackedMatrix], device: torch.device, bias: torch.Tensor | None = None
) -> ExpertMatrices:
    """Those of one shape. Where they lie on the device, equally far apart, they stay: they may be gigabytes."""
    first = matrices[0]
    rows = _lying_there([matrix.rows for matrix in matrices], device)
    if rows is None:
        stride = first.row_format.close_row_bytes(first.columns)
        width, count = first.rows.shape[1], first.num_rows
        memory = torch.zeros(len(matrices) * count * stride + width - stride, dtype=torch.uint8, device=device)
        memory[: len(matrices) * count * stride].view(len(matrices), count, stride).copy_(
            torch.stack([matrix.rows[:, :stride] for matrix in matrices])
        )
        rows = memory.as_strided((len(matrices), count, width), (count * stride, stride, 1))
    return ExpertMatrices(rows, first.columns, first.row_format, bias)


def _lying_there(rows: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor | None:
    """uint8 [N, row_bytes] each -> [E, N, row_bytes] in the same memory; None where that cannot be."""
    first = rows[0]
    storage = first.untyped_storage()
    offsets = [each.storage_offset() for each in rows]
    apart = offsets[1] - offsets[0] if len(rows) > 1 else first.numel()
    is_one = (
        first.device == device
        and apart > 0
        and all(each.untyped_storage().data_ptr() == storage.data_ptr() for each in rows)
        and all(each.shape == first.shape and each.stride() == first.stride() for each in rows)
        and offsets == [offsets[0] + idx * apart for idx in range(len(rows))]
    )
    return first.as_strided((len(rows), *first.shape), (apart, *first.stride())) if is_one else None
