"""The forward pass of every family: token ids in, logits out. Knows token ids and weights, never text or files.

One token runs as a program of compiled kernels (token_program.py); several go through the layers one operation at a
time, each over the whole batch.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Literal, get_args

import torch

from hybrid_kernels.attention.op import attention
from hybrid_kernels.linear.op import linear
from hybrid_kernels.packed_matrix import PackedMatrix
from hybrid_kernels.quantization.op import dequantize_rows
from hybrid_kernels.rope.op import apply_rope
from hybrid_kernels.routing.op import route
from hybrid_kernels.sparse_ffn.op import sparse_ffn
from hybrid_kernels.team import Team
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import UsageError
from hybrid_runtime.model.counters import DecodeCounters
from hybrid_runtime.model.kv_cache import KvCache
from hybrid_runtime.model.norms import apply_norm
from hybrid_runtime.model.observer import FfnPass, Observer
from hybrid_runtime.model.rope_frequencies import rope_frequencies
from hybrid_runtime.model.stepping import Stepping, Timed
from hybrid_runtime.model.tiered_ffn import tiered_ffn
from hybrid_runtime.model.token_program import TokenProgram
from hybrid_runtime.model.weights import DecoderLayer, DecoderWeights, Norm, Projection
from hybrid_runtime.tiers.bundles import TieredBundles

PredictorMode = Literal["mask", "trained", "off", "gate"]
"""mask: neurons that the checkpoint's predictor rules out are not computed (TurboSparse's own definition).
trained: the same with the predictors that were trained for the store and lie beside it (hybrid-predictors).
off: no predictor, every neuron counts. gate: the same, and every gate is computed before the rest of its neuron, which
is spared where the gate does not fire (exact; the compiled kernels spare it in the other modes too)."""
PREDICTOR_MODES: tuple[PredictorMode, ...] = get_args(PredictorMode)
# A batch reads from disk what any of its tokens needs before it computes; tokens one by one read while they compute.
# Measured: 17 tokens of TurboSparse-Mixtral's shape took 24 s together, while one alone took half a second.
ONE_BY_ONE = 48
Rotation = tuple[torch.Tensor, float]
"""Inverse frequencies [D / 2] and magnitude of the rotary positions."""


def choose_predictor_mode(config: ModelConfig, wanted: PredictorMode | None) -> PredictorMode:
    """The mode to run with; None asks for the model's own. Raise UsageError for a mode that the model cannot have."""
    if wanted is None:
        if config.predictor_is_part_of_model:
            return "mask"
        return "gate" if config.activation.gate_decides else "off"
    if wanted == "mask" and config.predictor_input is None:
        raise UsageError("--predictor mask: this checkpoint carries no predictor; use off or gate")
    if wanted == "gate" and not config.activation.gate_decides:
        raise UsageError(f"--predictor gate: {config.activation.kind} leaves no exact zeros at its gate; use off")
    return wanted


class Decoder:
    """One model ready to compute. Holds no state of a sequence: that is in the KvCache.

    team: the threads that compute; one, where none is given. counters: what has been computed since they were reset.
    steps, step_s: tokens computed one at a time so far, and seconds of compiled code for them.
    """

    def __init__(
        self, config: ModelConfig, weights: DecoderWeights, predictor_mode: PredictorMode, team: Team | None = None
    ) -> None:
        self.config = config
        self.weights = weights
        self.predictor_mode = predictor_mode
        self.team = team or Team(1)
        self.counters = DecodeCounters(self.team)
        self.steps, self.step_s = 0, 0.0
        if weights.tiering is not None:
            weights.tiering.cache.serve(self.team)
        self._programs: weakref.WeakKeyDictionary[KvCache, Stepping] = weakref.WeakKeyDictionary()

    @property
    def masks(self) -> bool:
        """Whether predictors rule neurons out."""
        return self.predictor_mode in ("mask", "trained")

    @property
    def is_on_cuda(self) -> bool:
        """Whether a GPU computes some of it."""
        return False

    @property
    def way(self) -> str:
        """How work gets to the GPU, where there is one."""
        return ""

    @property
    def vram_peak_bytes(self) -> int:
        """Most of a GPU's memory that was held, without what CUDA takes for itself; 0 without one."""
        return 0

    def crossed_bytes(self, cache: KvCache) -> int:
        """Of a token, what goes to a GPU and back, carried values not counted; of a simulated one, what would."""
        del cache
        tiering = self.weights.tiering
        if tiering is None:
            return 0
        led = tiering.plan.gpu_layers.get("attention", frozenset())
        vectors = 0
        for layer_idx, merge in enumerate(tiering.merges):  # the stream to the other side, and its sum or values back
            away = "gpu" if layer_idx in led else "none"
            vectors += 0 if merge == away else 1 if merge == "hidden" and layer_idx in led else 2
        return vectors * self.config.hidden_size * 4

    def hot_neurons(self, cache: KvCache) -> int:
        """Active neurons that a GPU has listed by itself so far, for this cache's tokens."""
        del cache
        return 0

    @property
    def most_tokens_one_by_one(self) -> int:
        """How long a batch may be for its tokens to be quicker one by one than together."""
        tiering = self.weights.tiering
        return ONE_BY_ONE if tiering is not None and tiering.plan.disk_used_bytes else 0

    @torch.inference_mode()
    def forward(
        self,
        tokens: torch.Tensor,
        cache: KvCache,
        *,
        all_logits: bool = False,
        prompt_end: int = 0,
        observer: Observer | None = None,
    ) -> torch.Tensor:
        """tokens: [T] int64, T >= 1, after what the cache holds -> logits [T or 1, V] float32 (1: the last token's).

        prompt_end: where the prompt ends of which the tokens are one chunk; longrope rotates the first chunk by it too.
        observer: sees routing and neurons; with one, a single token is computed as a batch is.
        """
        end = cache.length + len(tokens)
        if len(tokens) == 1 and observer is None:
            program = self._program(cache)
            logits = program.step(int(tokens[0]), cache.length, max(end, prompt_end)).unsqueeze(0)
            self.steps, self.step_s = self.steps + 1, self.step_s + program.step_s
            if self.weights.tiering is not None:
                self.weights.tiering.cache.check()
            cache.length = end
            return logits.clone()
        positions = torch.arange(cache.length, end)
        rotation = self._rotation(max(end, prompt_end))
        x = self._embed(tokens, positions)  # [T, H]
        for layer_idx, layer in enumerate(self.weights.layers):
            x = self._layer(layer_idx, layer, x, positions, rotation, cache, observer)
        cache.length += len(tokens)
        return self._head(x if all_logits else x[-1:])

    def program_of(self, cache: KvCache) -> Timed:
        """The operations of one token with this cache, with their time counters."""
        return self._program(cache).program

    def _new_program(self, cache: KvCache) -> Stepping:
        return TokenProgram(self.config, self.weights, cache, self.team, masks=self.masks)

    def _program(self, cache: KvCache) -> Stepping:
        """The program of one token with this cache, prepared once."""
        program = self._programs.get(cache)
        if program is None:
            program = self._new_program(cache)
            self._programs[cache] = program
            self.counters.watch(program, active_are_read=self.masks)
        return program

    def _rotation(self, num_positions: int) -> Rotation | None:
        rope = self.config.rope
        return None if rope is None else rope_frequencies(rope, self.config.head_dim, num_positions)

    def _embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        embedding = self.weights.embed_tokens
        x = dequantize_rows(embedding.rows[tokens], embedding.columns, embedding.row_format)
        learned = self.weights.embed_positions
        if learned is not None:
            rows = learned.rows[positions + (self.config.learned_position_offset or 0)]
            x = x + dequantize_rows(rows, learned.columns, learned.row_format)
        return x

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
        """x: [T, H], the residual stream -> [T, H]."""
        layer_input = x
        x = x + self._attention(layer_idx, layer, self._norm(x, layer.input_layernorm), positions, rotation, cache)
        pre_norm = x
        post_norm = self._norm(x, layer.post_attention_layernorm)
        taps = {"layer_input": layer_input, "pre_norm": pre_norm, "post_norm": post_norm}
        predictor_input = taps[self.config.predictor_input or "post_norm"]
        if layer.router is None:
            return x + self._feed_forward(layer_idx, 0, None, post_norm, predictor_input, observer)
        router_input = taps[self.config.router_input]
        return x + self._mixture(layer_idx, layer.router, post_norm, router_input, predictor_input, observer)

    def _attention(
        self,
        layer_idx: int,
        layer: DecoderLayer,
        x: torch.Tensor,
        positions: torch.Tensor,
        rotation: Rotation | None,
        cache: KvCache,
    ) -> torch.Tensor:
        config = self.config
        query, keys, values = (
            self._project(x, projection).view(len(x), -1, config.head_dim)
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
        )  # [T, heads, D], [T, kv_heads, D] twice
        if rotation is not None and config.rotates(layer_idx):
            query = apply_rope(query, positions, *rotation)
            keys = apply_rope(keys, positions, *rotation)
        keys, values = cache.append(layer_idx, keys, values)
        mixed = attention(query, keys, values, cache.length, config.window(layer_idx))  # [T, heads, D]
        return self._project(mixed.reshape(len(x), -1), layer.o_proj)

    def _mixture(
        self,
        layer_idx: int,
        router: PackedMatrix,
        x: torch.Tensor,
        router_input: torch.Tensor,
        predictor_input: torch.Tensor,
        observer: Observer | None,
    ) -> torch.Tensor:
        """Each token's FFN is the weighted sum of its experts, added in the order of expert numbers."""
        config = self.config
        experts, weights = route(
            linear(router_input, router, team=self.team),
            config.num_experts_per_tok,
            config.router_score,
            normalize=config.normalize_expert_weights,
        )  # [T, k] each
        if observer is not None:
            observer.see_routing(layer_idx, experts)
        output = torch.zeros_like(x)
        for expert_idx in sorted(set(experts.flatten().tolist())):
            tokens, slots = (experts == expert_idx).nonzero(as_tuple=True)
            summand = self._feed_forward(layer_idx, expert_idx, tokens, x[tokens], predictor_input[tokens], observer)
            output[tokens] += summand * weights[tokens, slots].unsqueeze(1)
        return output

    def _feed_forward(
        self,
        layer_idx: int,
        expert_idx: int,
        tokens: torch.Tensor | None,
        x: torch.Tensor,
        predictor_input: torch.Tensor,
        observer: Observer | None,
    ) -> torch.Tensor:
        """One network over x: [n, H]. tokens: int64 [n], which of the batch they are; None: all."""
        ffn = self.weights.layers[layer_idx].experts[expert_idx]
        active = None
        if self.masks:
            assert ffn.predictor is not None
            active = ffn.predictor.active(predictor_input, self.team)  # [T, I]
        observe = None
        if observer is not None:
            observe = partial(observer.see_neurons, FfnPass(layer_idx, expert_idx, tokens, predictor_input))
        activation, bundles = self.config.activation, ffn.bundles
        if isinstance(bundles, TieredBundles):
            return tiered_ffn(x, bundles, activation, active, team=self.team, observe=observe)
        return sparse_ffn(x, bundles, activation, active, team=self.team, observe=observe)

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, H] -> logits [T, V]."""
        return linear(self._norm(x, self.weights.norm), self.weights.lm_head, team=self.team)

    def _norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        return apply_norm(self.config, norm, x)

    def _project(self, x: torch.Tensor, projection: Projection) -> torch.Tensor:
        return linear(x, projection.weight, projection.bias, team=self.team)
