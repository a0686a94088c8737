"""A decoder's weights in memory, named as the checkpoint names them, built from the parts of a store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from hybrid_kernels.packed_matrix import Bundles, PackedMatrix
from hybrid_predictors.mlp import MlpPredictor
from hybrid_predictors.predictor import Predictor
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.model.weight_specs import ffn_names
from hybrid_runtime.store.memory import LoadMode
from hybrid_runtime.store.reader import Store, Weight
from hybrid_runtime.tiers.bundles import TieredBundles
from hybrid_runtime.tiers.load import TieredWeights
from hybrid_runtime.tiers.tiering import Tiering

AnyWeight = Weight | TieredBundles


@dataclass(frozen=True, slots=True)
class Norm:
    """weight, bias: [H] float32; no bias for RMSNorm."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Projection:
    """weight: [N, K]; bias: [N] float32 where the family has one."""

    weight: PackedMatrix
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class FeedForward:
    """One FFN, or one expert: its neurons, and the predictor that comes with the checkpoint or was trained for it."""

    bundles: Bundles | TieredBundles
    predictor: Predictor | None

    @property
    def plain_bundles(self) -> Bundles:
        """The neurons of a model that is in memory as a whole."""
        assert isinstance(self.bundles, Bundles)
        return self.bundles

    @property
    def tiered_bundles(self) -> TieredBundles:
        """The neurons of a model that is spread over tiers."""
        assert isinstance(self.bundles, TieredBundles)
        return self.bundles


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """router: [E, H], only in a mixture, which has E experts; a dense layer has one."""

    input_layernorm: Norm
    q_proj: Projection
    k_proj: Projection
    v_proj: Projection
    o_proj: Projection
    post_attention_layernorm: Norm
    router: PackedMatrix | None
    experts: tuple[FeedForward, ...]

    def low_rank_predictors(self) -> list[MlpPredictor]:
        """The experts' predictors; only this kind has kernels for one token."""
        predictors = [ffn.predictor for ffn in self.experts if isinstance(ffn.predictor, MlpPredictor)]
        assert len(predictors) == len(self.experts)
        return predictors


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """lm_head is embed_tokens itself where the two are tied. tiering: None where all is in one memory."""

    embed_tokens: PackedMatrix
    embed_positions: PackedMatrix | None
    layers: tuple[DecoderLayer, ...]
    norm: Norm
    lm_head: PackedMatrix
    tiering: Tiering | None = None


def load_weights(store: Store, load: LoadMode = "anonymous") -> DecoderWeights:
    """Every part of the store in memory once, or mapped."""
    config = store.manifest.config
    embed, *layer_weights, head = store.read_parts(store.manifest.parts, load)
    layers = tuple(_layer(config, layer_idx, weights) for layer_idx, weights in enumerate(layer_weights))
    return _decoder_weights(layers, embed | head)


def tiered_weights(config: ModelConfig, loaded: TieredWeights, tiering: Tiering) -> DecoderWeights:
    """The same over what was loaded by tiers."""
    layers = []
    for layer_idx, (dense, networks) in enumerate(zip(loaded.layers, loaded.networks, strict=True)):
        names = [f"{ffn}.bundles" for ffn in ffn_names(config, layer_idx)]
        neurons: dict[str, AnyWeight] = dict(zip(names, networks, strict=True))
        layers.append(_layer(config, layer_idx, {**dense, **neurons}))
    return replace(_decoder_weights(tuple(layers), loaded.outer), tiering=tiering)


def _decoder_weights(layers: tuple[DecoderLayer, ...], outer: Mapping[str, AnyWeight]) -> DecoderWeights:
    embed_tokens = _matrix(outer, "embed_tokens")
    return DecoderWeights(
        embed_tokens=embed_tokens,
        embed_positions=_matrix(outer, "embed_positions") if "embed_positions" in outer else None,
        layers=layers,
        norm=_norm(outer, "norm"),
        lm_head=_matrix(outer, "lm_head") if "lm_head" in outer else embed_tokens,
    )


def _layer(config: ModelConfig, layer_idx: int, weights: Mapping[str, AnyWeight]) -> DecoderLayer:
    layer = f"layers.{layer_idx}"
    return DecoderLayer(
        input_layernorm=_norm(weights, f"{layer}.input_layernorm"),
        q_proj=_projection(weights, f"{layer}.self_attn.q_proj"),
        k_proj=_projection(weights, f"{layer}.self_attn.k_proj"),
        v_proj=_projection(weights, f"{layer}.self_attn.v_proj"),
        o_proj=_projection(weights, f"{layer}.self_attn.o_proj"),
        post_attention_layernorm=_norm(weights, f"{layer}.post_attention_layernorm"),
        router=_matrix(weights, f"{layer}.mlp.router") if config.num_experts else None,
        experts=tuple(_feed_forward(config, weights, ffn) for ffn in ffn_names(config, layer_idx)),
    )


def _feed_forward(config: ModelConfig, weights: Mapping[str, AnyWeight], ffn: str) -> FeedForward:
    bundles = weights[f"{ffn}.bundles"]
    assert isinstance(bundles, Bundles | TieredBundles)
    bundles = replace(
        bundles,
        gate_bias=_vector(weights, f"{ffn}.gate_proj.bias"),
        up_bias=_vector(weights, f"{ffn}.up_proj.bias"),
        down_bias=_vector(weights, f"{ffn}.down_proj.bias"),
    )
    predictor = None
    if config.predictor_input is not None:
        fc1, fc2 = _matrix(weights, f"{ffn}.predictor.fc1"), _matrix(weights, f"{ffn}.predictor.fc2")
        predictor = MlpPredictor(fc1, fc2, config.predictor_threshold)
    return FeedForward(bundles, predictor)


def _matrix(weights: Mapping[str, AnyWeight], name: str) -> PackedMatrix:
    weight = weights[name]
    assert isinstance(weight, PackedMatrix)
    return weight


def _vector(weights: Mapping[str, AnyWeight], name: str) -> torch.Tensor | None:
    weight = weights.get(name)
    assert weight is None or isinstance(weight, torch.Tensor)
    return weight


def _norm(weights: Mapping[str, AnyWeight], name: str) -> Norm:
    weight = _vector(weights, name)
    assert weight is not None
    return Norm(weight, _vector(weights, f"{name}.bias"))


def _projection(weights: Mapping[str, AnyWeight], name: str) -> Projection:
    return Projection(_matrix(weights, name), _vector(weights, f"{name}.bias"))
