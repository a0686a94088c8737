"""The forward pass of a model that is on a GPU and in RAM at once, as a plan says."""

from __future__ import annotations

import weakref
from dataclasses import replace

import torch

from hybrid_kernels.attention.gpu import LayerCache
from hybrid_kernels.team import Team
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import UsageError
from hybrid_runtime.gpu.batch import Batch, batch_layer, dense_linear
from hybrid_runtime.gpu.device import GpuDevice
from hybrid_runtime.gpu.layer import apply_norm, make_gpu_layer, matrix_there, norm_there
from hybrid_runtime.gpu.networks import hot_networks
from hybrid_runtime.gpu.rotation import RotationTables
from hybrid_runtime.gpu.token_script import GpuSide, TokenScript
from hybrid_runtime.model.decoder import Decoder, PredictorMode, Rotation
from hybrid_runtime.model.kv_cache import KvCache
from hybrid_runtime.model.observer import Observer
from hybrid_runtime.model.stepping import Stepping
from hybrid_runtime.model.weights import DecoderLayer, DecoderWeights

CROSSING_TOKENS = 32  # of a batch: from here on copying cold neurons to the GPU is taken to be sooner than the CPU


class GpuDecoder(Decoder):
    """A Decoder whose weights are spread over a GPU and RAM (weights.tiering), on either side as its plan has them.

    crossing_tokens: of a batch, from which on the GPU computes cold neurons, too.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        predictor_mode: PredictorMode,
        team: Team,
        device: GpuDevice,
        *,
        crossing_tokens: int = CROSSING_TOKENS,
    ) -> None:
        """Raises UsageError for a model that the GPU's kernels do not compute."""
        tiering = weights.tiering
        assert tiering is not None
        require_computable(config)
        super().__init__(config, weights, predictor_mode, team)
        self.device = device
        self.crossing_tokens = crossing_tokens
        plan, there = tiering.plan, device.torch_device
        led = sorted(plan.gpu_layers.get("attention", ()))
        layers = {idx: make_gpu_layer(idx, weights.layers[idx], there, masks=self.masks) for idx in led}
        self.weights = weights = _without_predictors(weights, led)
        networks = {
            idx: hot_networks([ffn.tiered_bundles for ffn in layer.experts], there)
            for idx, layer in enumerate(weights.layers)
            if idx in layers or tiering.merges[idx] != "none"
        }
        norms = {
            idx: norm_there(weights.layers[idx].post_attention_layernorm, there)
            for idx in networks
            if idx not in layers
        }
        head = None
        if "head" in plan.gpu_parts:
            head = norm_there(weights.norm, there)
            self.weights = replace(weights, lm_head=matrix_there(weights.lm_head, there))
        self._side = GpuSide(device, layers, networks, norms, head, RotationTables(there))
        self._caches: weakref.WeakKeyDictionary[KvCache, dict[int, LayerCache]] = weakref.WeakKeyDictionary()

    @property
    def is_on_cuda(self) -> bool:
        """Whether a GPU computes some of it; in Triton's interpreter none does."""
        return self.device.is_cuda

    @property
    def way(self) -> str:
        """How work gets to the GPU."""
        return self.device.way

    @property
    def vram_peak_bytes(self) -> int:
        """Most of its memory that this process has held."""
        return self.device.peak_bytes()

    def crossed_bytes(self, cache: KvCache) -> int:
        """Of a token, what goes over the bus."""
        program = self._program(cache)
        assert isinstance(program, TokenScript)
        return program.crossed_bytes

    def hot_neurons(self, cache: KvCache) -> int:
        """Active neurons that the GPU has listed by itself so far. Waits for it."""
        program = self._program(cache)
        assert isinstance(program, TokenScript)
        return program.hot_neurons()

    def _new_program(self, cache: KvCache) -> Stepping:
        caches = self._caches_of(cache)
        return TokenScript(self.config, self.weights, self._side, cache, caches, self.team, masks=self.masks)

    def _caches_of(self, cache: KvCache) -> dict[int, LayerCache]:
        """Keys and values of the layers that the GPU leads; of those, the cache in RAM is never touched."""
        caches = self._caches.get(cache)
        if caches is None:
            there, config = self.device.torch_device, self.config
            caches = {
                idx: LayerCache(
                    torch.zeros(cache.keys.shape[1:], dtype=cache.keys.dtype, device=there),
                    torch.zeros(cache.values.shape[1:], dtype=cache.values.dtype, device=there),
                    config.num_key_value_heads,
                    config.head_dim,
                )
                for idx in self._side.layers
            }
            self._caches[cache] = caches
        return caches

    def _layer(
        self,
        layer_idx: int,
        layer: DecoderLayer,
        x: torch.Tensor,
        positions: torch.Tensor,
        rotation: Rotation | None,
        cache: KvCache,
        observer: Observer | None,
    ) -> torch.Tensor:
        """x: on either side -> on the side that leads the layer. Nothing can be observed: profiles are made without."""
        assert observer is None
        gpu_layer = self._side.layers.get(layer_idx)
        if gpu_layer is None:
            return super()._layer(layer_idx, layer, x.cpu(), positions, rotation, cache, observer)
        there = self.device.torch_device
        turns = self._side.rotations.of(rotation, cache.num_positions)
        batch = Batch(positions.int().to(there), turns, crosses=len(x) >= self.crossing_tokens)
        bundles = [ffn.tiered_bundles for ffn in layer.experts]
        networks, caches = self._side.networks[layer_idx], self._caches_of(cache)
        return batch_layer(
            self.config, gpu_layer, networks, bundles, x.to(there), batch, caches[layer_idx], self.device, self.team
        )

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        if self._side.head is None:
            return super()._head(x.cpu())
        normed = apply_norm(self.config, self._side.head, x.to(self.device.torch_device))
        return dense_linear(normed, self.weights.lm_head).cpu()


def require_computable(config: ModelConfig) -> None:
    """Raise UsageError for heads of a size that the GPU's kernels do not have."""
    if config.head_dim & (config.head_dim - 1) or config.head_dim < 16:
        raise UsageError(
            f"--vram: head_dim is {config.head_dim}, and the GPU's kernels compute powers of two from 16 on; leave "
            "--vram out, or give --simulate-gpu"
        )


def _without_predictors(weights: DecoderWeights, layers: list[int]) -> DecoderWeights:
    """Without those of layers whose predictors are on the GPU now."""
    gone = set(layers)
    return replace(
        weights,
        layers=tuple(
            replace(layer, experts=tuple(replace(ffn, predictor=None) for ffn in layer.experts))
            if idx in gone
            else layer
            for idx, layer in enumerate(weights.layers)
        ),
    )
