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
from hybrid_runtime.model.weights import DecoderLayer, Norm, Projection

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, float32 [all positions, D / 2], magnitude included."""


@dataclass(frozen=True, slots=True)
class GpuPredictor:
    """A layer's predictors, stacked. shares_fc1: whether all have the same fc1, which is there once."""

    fc1: ExpertMatrices
    fc2: ExpertMatrices
    shares_fc1: bool
    threshold: float
    has_relu: bool


@dataclass(frozen=True, slots=True)
class GpuLayer:
    """A layer whose attention is on the GPU, with its router; predictor: where predictors rule neurons out."""

    layer_idx: int
    input_layernorm: Norm
    q_proj: Projection
    k_proj: Projection
    v_proj: Projection
    o_proj: Projection
    post_attention_layernorm: Norm
    router: PackedMatrix | None
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


def make_gpu_layer(
    config: ModelConfig, layer_idx: int, layer: DecoderLayer, device: torch.device, *, masks: bool
) -> GpuLayer:
    """What is not there yet is copied. masks: whether predictors rule neurons out."""
    return GpuLayer(
        layer_idx,
        norm_there(layer.input_layernorm, device),
        _projection(layer.q_proj, device),
        _projection(layer.k_proj, device),
        _projection(layer.v_proj, device),
        _projection(layer.o_proj, device),
        norm_there(layer.post_attention_layernorm, device),
        None if layer.router is None else matrix_there(layer.router, device),
        _predictor(config, layer, device) if masks else None,
    )


def attend(
    config: ModelConfig,
    layer: GpuLayer,
    x: torch.Tensor,
    positions: torch.Tensor,
    rotation: Rotation | None,
    cache: LayerCache,
) -> Taps:
    """x: float32 [T, H]; positions: int32 [T]. Appends to the cache; T as many as `linear` takes."""
    normed = apply_norm(config, layer.input_layernorm, x)
    query, keys, values = (
        linear(normed, projection.weight, projection.bias).view(len(x), -1, config.head_dim)
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    turns = rotation if config.rotates(layer.layer_idx) else None
    rotate_and_append(query, keys, values, turns, positions, cache)
    mixed = attention(query, cache, positions, config.window(layer.layer_idx))  # [T, heads, D]
    middle = x + linear(mixed.view(len(x), -1), layer.o_proj.weight, layer.o_proj.bias)
    return Taps(x, middle, apply_norm(config, layer.post_attention_layernorm, middle))


def choose_experts(config: ModelConfig, layer: GpuLayer, taps: Taps) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [T * k] and their weights, float32 [T * k]; of a dense layer its only network, with weight 1."""
    num_tokens, device = len(taps.post_norm), taps.post_norm.device
    if layer.router is None:
        return torch.zeros(num_tokens, dtype=torch.int32, device=device), torch.ones(num_tokens, device=device)
    logits = torch.cat([linear(some, layer.router) for some in torch.split(taps.at(config.router_input), MOST_VECTORS)])
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


def _predictor(config: ModelConfig, layer: DecoderLayer, device: torch.device) -> GpuPredictor:
    predictors: list[MlpPredictor] = layer.low_rank_predictors()
    first = [predictor.fc1 for predictor in predictors]
    shares = len(predictors) > 1 and all(each.rows.data_ptr() == first[0].rows.data_ptr() for each in first)
    biases = [predictor.bias for predictor in predictors if predictor.bias is not None]
    bias = torch.cat(biases).to(device) if len(biases) == len(predictors) else None
    return GpuPredictor(
        ExpertMatrices(stacked(first[:1] if shares else first, device), first[0].num_rows),
        ExpertMatrices(stacked([each.fc2 for each in predictors], device), config.intermediate_size, bias),
        shares,
        predictors[0].threshold,
        predictors[0].has_relu,
    )


def stacked(matrices: Sequence[PackedMatrix], device: torch.device) -> PackedMatrix:
    """One below the other on the device, without the padding of rows."""
    like = matrices[0]
    stride, num_rows = like.row_format.close_row_bytes(like.columns), sum(each.num_rows for each in matrices)
    width = like.rows.shape[1]
    memory = torch.zeros(num_rows * stride + width - stride, dtype=torch.uint8, device=device)
    start = 0
    for matrix in matrices:
        count = matrix.num_rows * stride
        memory[start : start + count].view(matrix.num_rows, stride).copy_(matrix.rows[:, :stride])
        start += count
    return PackedMatrix(memory.as_strided((num_rows, width), (stride, 1)), like.columns, like.row_format)
