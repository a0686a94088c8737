"""The compiled operations of one token, layer by layer, and the memory that they share.

token_program.py runs all of them as one program, gpu/token_script.py those that a GPU leaves to the CPU. A layer is
seven operations, or nine with a predictor, with a barrier after each:

    project   norm, then queries, keys and values
    attend    rotary positions, append to the cache, attention
    project   attention's output, added to the stream
    project, route     a mixture's router
    project, project   the predictor's two matrices; the second selects neurons
    run_neurons, sum_shares   the active neurons, and their sum added to the stream

They compute what decoder.py's forward computes for a batch; tests hold the two together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from hybrid_kernels.attention import layout as attention_words
from hybrid_kernels.linear import layout as linear_words
from hybrid_kernels.native import input_layout as input_words
from hybrid_kernels.native.arguments import Word, words
from hybrid_kernels.native.huge_pages import aligned_zeros
from hybrid_kernels.native.kernel_names import kernel
from hybrid_kernels.packed_matrix import PackedMatrix
from hybrid_kernels.rope import layout as rope_words
from hybrid_kernels.routing import layout as routing_words
from hybrid_kernels.routing.reference import ROUTER_SCORES
from hybrid_kernels.row_codes import format_code, num_groups, vector_columns
from hybrid_kernels.team import Beginning, Operation, Team
from hybrid_predictors.mlp import MlpPredictor
from hybrid_runtime.config import ModelConfig, StreamPoint
from hybrid_runtime.model.kv_cache import Q8, KvCache, position_bytes
from hybrid_runtime.model.neuron_operations import NeuronOperations, Zeros, plain_zeros
from hybrid_runtime.model.rope_frequencies import rope_frequencies
from hybrid_runtime.model.token_memory import TokenMemory, padded
from hybrid_runtime.model.weights import DecoderLayer, DecoderWeights, Norm, Projection

TASK_BYTES = 96 << 10  # of rows that a worker draws at once: some microseconds of reading
BEGINNING_BYTES = 32 << 10  # of a worker's first tasks: what the memory brings while it waits at a barrier
ROWS_PER_BLOCK = 64  # of a predictor's second matrix
assert ROWS_PER_BLOCK <= linear_words.MOST_SELECTED


class TokenOperations:
    """Of one decoder with one cache. memory: what they share; token: int64 [2], the token and its position; logits:
    float32 [V]; neurons: those of networks; read_rows: int64 [workers, 8].

    It keeps the cache's memory and not the cache, so that who holds it by the cache weakly can forget both.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        cache: KvCache,
        team: Team,
        *,
        masks: bool,
        zeros: Zeros = plain_zeros,
    ) -> None:
        """zeros: makes what a GPU copies."""
        self._config = config
        self._weights = weights
        self._team = team
        self._masks = masks
        self._kept: list[object] = [cache.keys, cache.values]  # what compiled code holds addresses of
        self._cache = (cache.keys, cache.values, cache.dtype)
        self.token = np.zeros(2, dtype=np.int64)
        hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self._stream, self._middle = self._floats(hidden), self._floats(hidden)
        self._query, self._mixed = self._floats(heads), self._floats(heads)
        self._keys, self._values = self._floats(kv_width), self._floats(kv_width)
        self.logits = torch.zeros(config.vocab_size)
        half_dim = 0 if config.rope is None else config.head_dim // 2
        self._frequencies, self._cosines, self._sines = (self._floats(max(half_dim, 1)) for _ in range(3))
        slots = config.num_experts_per_tok if config.num_experts else 1
        self._chosen = np.zeros(slots, dtype=np.int64)
        self._expert_weights = self._floats(slots)
        self._router_logits = self._floats(max(config.num_experts, 1))
        self._selected = np.zeros((slots, config.intermediate_size), dtype=np.int32)
        self._counts = np.zeros((slots, -(-config.intermediate_size // ROWS_PER_BLOCK)), dtype=np.int64)
        predictors = [ffn.predictor for layer in weights.layers for ffn in layer.experts] if masks else []
        ranks = [predictor.rank for predictor in predictors if isinstance(predictor, MlpPredictor)]
        self._rank_width = padded(max(ranks, default=1))
        self._predictor_hidden = self._floats(slots * self._rank_width)
        widest = max(padded(hidden), padded(heads), self._rank_width)
        self._scratch_stride = max(
            input_words.scratch_bytes(widest),
            attention_words.scratch_bytes(
                config.num_attention_heads, config.num_key_value_heads, config.head_dim, cache.num_positions
            ),
        )
        self._scratch = aligned_zeros((self._scratch_stride * team.num_threads,), np.uint8)
        self.read_rows = np.zeros((team.num_threads, 8), dtype=np.int64)
        self.memory = TokenMemory(
            config,
            self._stream,
            self._middle,
            self._chosen,
            self._expert_weights,
            self._selected if masks else None,
            self._counts,
            ROWS_PER_BLOCK,
            self._scratch,
            self._scratch_stride,
            self.read_rows,
        )
        self.neurons = NeuronOperations(self.memory, team.num_threads, weights.tiering, zeros)
        self._begin_words = self._begin_arguments(half_dim)
        self._set_rotation(1)

    def set_token(self, token: int, position: int, num_positions: int) -> None:
        """What the operations compute next. num_positions: how long the sequence is, or its prompt, which longrope
        rotates by.
        """
        self.token[:] = token, position
        if self._config.rope is not None and self._config.rope.kind == "longrope":
            self._set_rotation(num_positions)

    def _floats(self, size: int) -> np.ndarray:
        return np.zeros(padded(size), dtype=np.float32)

    def _keep(self, array: np.ndarray) -> np.ndarray:
        self._kept.append(array)
        return array

    def _set_rotation(self, num_positions: int) -> None:
        if self._config.rope is None:
            return
        frequencies, magnitude = rope_frequencies(self._config.rope, self._config.head_dim, num_positions)
        self._frequencies[: len(frequencies)] = frequencies.numpy()
        self._begin_words[rope_words.MAGNITUDE] = words(1, {0: magnitude})[0]

    def begin(self) -> Operation:
        """The token's embedding, and its rotation."""
        return Operation(kernel("begin_token", self._weights.embed_tokens.row_format), "begin", self._begin_words)

    def selection(self, layer_idx: int) -> Iterator[Operation]:
        """Which experts and which of their neurons, by a router and a predictor, where the layer has them."""
        layer = self._weights.layers[layer_idx]
        if layer.router is not None:
            yield from self._routing(layer)
        if self._masks:
            yield from self._prediction(layer)

    def head(self) -> Operation:
        """The last norm, and the logits."""
        head = Projection(self._weights.lm_head, None)
        return self._project("head", [head], self._stream, [self.logits], norm=self._weights.norm)

    def _begin_arguments(self, half_dim: int) -> np.ndarray:
        embedding, learned = self._weights.embed_tokens, self._weights.embed_positions
        values: dict[int, Word] = {
            rope_words.TOKEN: self.token,
            rope_words.EMBED_ROWS: embedding.rows,
            rope_words.EMBED_STRIDE: embedding.rows.stride(0),
            rope_words.EMBED_CODE: format_code(embedding.row_format),
            rope_words.EMBED_GROUPS: num_groups(embedding.row_format, embedding.columns),
            rope_words.EMBED_VALUE_BYTES: embedding.row_format.value_bytes(embedding.columns),
            rope_words.X: self._stream,
            rope_words.HIDDEN_SIZE: self._config.hidden_size,
            rope_words.HALF_DIM: half_dim,
            rope_words.INVERSE_FREQUENCIES: self._frequencies,
            rope_words.COSINES: self._cosines,
            rope_words.SINES: self._sines,
        }
        if learned is not None:
            values |= {
                rope_words.LEARNED_ROWS: learned.rows,
                rope_words.LEARNED_STRIDE: learned.rows.stride(0),
                rope_words.LEARNED_CODE: format_code(learned.row_format),
                rope_words.LEARNED_GROUPS: num_groups(learned.row_format, learned.columns),
                rope_words.LEARNED_VALUE_BYTES: learned.row_format.value_bytes(learned.columns),
                rope_words.LEARNED_OFFSET: self._config.learned_position_offset or 0,
                rope_words.SPARE: self._middle,
            }
        return words(rope_words.NUM_WORDS, values)

    def attention(self, layer_idx: int) -> Iterator[Operation]:
        """From the stream to the stream after attention."""
        config, layer = self._config, self._weights.layers[layer_idx]
        keys, cached_values, dtype = self._cache
        targets = {"q": self._query, "k": self._keys, "v": self._values}
        projections = {"q": layer.q_proj, "k": layer.k_proj, "v": layer.v_proj}
        formats = {projection.weight.row_format for projection in projections.values()}
        for row_format in sorted(formats, key=format_code):  # shared keys may be finer than the rest
            names = [name for name, projection in projections.items() if projection.weight.row_format == row_format]
            yield self._project(
                "attention",
                [projections[name] for name in names],
                self._stream,
                [targets[name] for name in names],
                norm=layer.input_layernorm,
                barrier=row_format == max(formats, key=format_code),
            )
        window = config.window(layer_idx)
        values: dict[int, Word] = {
            attention_words.TOKEN: self.token,
            attention_words.QUERY: self._query,
            attention_words.NEW_KEYS: self._keys,
            attention_words.NEW_VALUES: self._values,
            attention_words.OUTPUT: self._mixed,
            attention_words.NUM_HEADS: config.num_attention_heads,
            attention_words.NUM_KV_HEADS: config.num_key_value_heads,
            attention_words.HEAD_DIM: config.head_dim,
            attention_words.ROTATES: int(config.rotates(layer_idx)),
            attention_words.COSINES: self._cosines,
            attention_words.SINES: self._sines,
            attention_words.KEY_CACHE: keys[layer_idx],
            attention_words.VALUE_CACHE: cached_values[layer_idx],
            attention_words.POSITION_STRIDE: position_bytes(config, dtype),
            attention_words.KV_KIND: ("f32", "f16", "q8").index(dtype),
            attention_words.KV_VALUE_BYTES: Q8.value_bytes(config.num_key_value_heads * config.head_dim),
            attention_words.WINDOW: window or 0,
            attention_words.SCALE: 1 / math.sqrt(config.head_dim),
            attention_words.SCRATCH: self._scratch,
            attention_words.SCRATCH_STRIDE: self._scratch_stride,
        }
        yield Operation(kernel("attend"), "KV cache", words(attention_words.NUM_WORDS, values))
        yield self._project("attention", [layer.o_proj], self._mixed, [self._middle], residual=self._stream)

    def tap(self, point: StreamPoint, layer: DecoderLayer) -> tuple[np.ndarray, Norm | None]:
        """Where a layer's stream is read, and the norm that it gets."""
        match point:
            case "layer_input":
                return self._stream, None
            case "pre_norm":
                return self._middle, None
            case "post_norm":
                return self._middle, layer.post_attention_layernorm

    def _routing(self, layer: DecoderLayer) -> Iterator[Operation]:
        assert layer.router is not None
        x, norm = self.tap(self._config.router_input, layer)
        yield self._project("router", [Projection(layer.router, None)], x, [self._router_logits], norm=norm)
        values: dict[int, Word] = {
            routing_words.LOGITS: self._router_logits,
            routing_words.NUM_EXPERTS: self._config.num_experts,
            routing_words.NUM_CHOSEN: self._config.num_experts_per_tok,
            routing_words.SCORE: ROUTER_SCORES.index(self._config.router_score),
            routing_words.NORMALIZE: int(self._config.normalize_expert_weights),
            routing_words.CHOSEN: self._chosen,
            routing_words.WEIGHTS: self._expert_weights,
        }
        yield Operation(kernel("route"), "router", words(routing_words.NUM_WORDS, values))

    def _prediction(self, layer: DecoderLayer) -> Iterator[Operation]:
        predictors = layer.low_rank_predictors()
        assert len({(predictor.threshold, predictor.has_relu) for predictor in predictors}) == 1
        x, norm = self.tap(self._config.predictor_input or "post_norm", layer)
        chosen = self._chosen if layer.router is not None else None
        slots = range(len(self._chosen))
        hidden = [self._predictor_hidden[slot * self._rank_width :] for slot in slots]
        first = [Projection(predictor.fc1, None) for predictor in predictors]
        kind = linear_words.RELU if predictors[0].has_relu else linear_words.STORE
        yield self._project("predictor", first, x, hidden, norm=norm, chosen=chosen, kind=kind)
        second = [Projection(predictor.fc2, predictor.bias) for predictor in predictors]
        yield self._project(
            "predictor",
            second,
            self._predictor_hidden,
            [self._selected[slot] for slot in slots],
            counts=[self._counts[slot] for slot in slots],
            input_stride=4 * self._rank_width,
            chosen=chosen,
            kind=linear_words.SELECT,
            threshold=predictors[0].threshold,
        )

    def _project(
        self,
        label: str,
        projections: Sequence[Projection],
        x: np.ndarray,
        outputs: Sequence[np.ndarray | torch.Tensor],
        *,
        norm: Norm | None = None,
        residual: np.ndarray | None = None,
        counts: Sequence[np.ndarray] | None = None,
        chosen: np.ndarray | None = None,
        input_stride: int = 0,
        kind: int = linear_words.STORE,
        threshold: float = 0.0,
        barrier: bool = True,
    ) -> Operation:
        """Rows of projections (of those that are chosen, where that is given) times x, one output each."""
        matrices = np.zeros((len(projections), linear_words.MATRIX_WORDS), dtype=np.int64)
        for row, projection in zip(matrices, projections, strict=True):
            row[:] = words(linear_words.MATRIX_WORDS, _matrix_words(projection))
        targets = np.zeros((len(outputs), linear_words.OUTPUT_WORDS), dtype=np.int64)
        for idx, output in enumerate(outputs):
            second = residual if counts is None else counts[idx]
            targets[idx] = words(
                linear_words.OUTPUT_WORDS, {linear_words.OUTPUT: output, linear_words.RESIDUAL: second}
            )
        weight = projections[0].weight
        assert all(projection.weight.row_format == weight.row_format for projection in projections)
        row_bytes = weight.rows.stride(0)
        rows_per_task = ROWS_PER_BLOCK if counts is not None else max(1, TASK_BYTES // row_bytes)
        beginning = None
        if chosen is None:
            beginning = Beginning(weight.rows.data_ptr(), rows_per_task * row_bytes, BEGINNING_BYTES)
        values: dict[int, Word] = {
            input_words.INPUT_STRIDE: input_stride,
            linear_words.NUM_MATRICES: len(outputs),
            linear_words.MATRICES: self._keep(matrices),
            linear_words.CHOSEN: chosen,
            linear_words.OUTPUTS: self._keep(targets),
            linear_words.OUTPUT_KIND: kind,
            linear_words.THRESHOLD: float(threshold),
            linear_words.ROWS_PER_TASK: rows_per_task,
            linear_words.NUM_STATIC: 0 if beginning is None else self._team.num_threads,
        }
        arguments = words(
            linear_words.NUM_WORDS, self.memory.vector_words(x, norm, weight.row_format, weight.columns) | values
        )
        return Operation(kernel("project", weight.row_format), label, arguments, barrier, beginning)


def _matrix_words(projection: Projection) -> Mapping[int, Word]:
    weight: PackedMatrix = projection.weight
    return {
        linear_words.ROWS: weight.rows,
        linear_words.STRIDE: weight.rows.stride(0),
        linear_words.NUM_ROWS: weight.num_rows,
        linear_words.BIAS: projection.bias,
        linear_words.MATRIX_COLUMNS: weight.columns,
        linear_words.MATRIX_VECTOR_COLUMNS: vector_columns(weight.row_format, weight.columns),
        linear_words.MATRIX_GROUPS: num_groups(weight.row_format, weight.columns),
        linear_words.MATRIX_VALUE_BYTES: weight.row_format.value_bytes(weight.columns),
    }
