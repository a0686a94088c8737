"""The operations of a token's program that compute a layer's neurons.

All in one place:     run_neurons, sum_shares

Spread over tiers, the active ones are split first, and what is on disk is asked for:

    split_neurons     active neurons on the GPU: hot; all others: cold
    run_neurons       hot ones, by the GPU; here by its twin, the same kernel over the GPU's own copies
    run_neurons       cold ones, which wait for the disk share by share
    run_down          where results merge before the down projection: the cold ones' down rows, by the GPU
    sum_shares        hot and cold shares, always in this order

Beside a GPU that is there, `split_operation` and `cold_operations` are what is left to the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from hybrid_kernels.activation_kinds import ACTIVATION_KINDS
from hybrid_kernels.native.arguments import Word, words
from hybrid_kernels.native.huge_pages import aligned_zeros
from hybrid_kernels.native.kernel_names import kernel
from hybrid_kernels.packed_matrix import Bundles
from hybrid_kernels.packed_order import packed_columns
from hybrid_kernels.row_codes import vector_columns
from hybrid_kernels.sparse_ffn import layout as ffn_words
from hybrid_kernels.team import Operation
from hybrid_kernels.tiers import layout as tier_words
from hybrid_runtime.model.token_memory import TokenMemory, padded
from hybrid_runtime.model.weights import DecoderLayer, Norm
from hybrid_runtime.tiers.bundles import TieredBundles
from hybrid_runtime.tiers.tiering import Tiering

NUM_SHARES = 32  # of a feed-forward network: the last ones to finish keep the others waiting by two of them at most


Zeros = Callable[[tuple[int, ...], type[np.generic]], np.ndarray]


def plain_zeros(shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """Of memory like any."""
    return np.zeros(shape, dtype)


class NeuronOperations:
    """Of every layer of one program; the layers share the memory in which neurons are listed and summed."""

    def __init__(
        self, memory: TokenMemory, num_threads: int, tiering: Tiering | None, zeros: Zeros = plain_zeros
    ) -> None:
        """zeros: makes the lists and values that a GPU copies."""
        self._memory = memory
        self._tiering = tiering
        self._kept: list[object] = [tiering]  # what compiled code holds addresses of
        config, slots, neurons = memory.config, memory.num_slots, memory.config.intermediate_size
        self._slot_shares = NUM_SHARES if tiering is None else 2 * NUM_SHARES
        self._shares = aligned_zeros((slots * self._slot_shares * padded(config.hidden_size),), np.float32)
        list_size = ffn_words.most_listed(neurons, NUM_SHARES)
        self._lists = np.zeros((num_threads, 2, list_size), dtype=np.int32)
        if tiering is not None:
            self.hot, self.cold, self._reads = (zeros((slots, neurons), np.int32) for _ in range(3))
            self.hot_counts, self.cold_counts = (zeros((slots,), np.int64) for _ in range(2))
            self._needed = np.zeros((slots, NUM_SHARES), dtype=np.int64)
            self.values = zeros((slots, neurons), np.float32)

    def operations(self, layer_idx: int, layer: DecoderLayer, x: np.ndarray, norm: Norm | None) -> Iterator[Operation]:
        """x: the stream that the networks read, and the norm that it gets."""
        if self._tiering is None:
            networks = [ffn.plain_bundles for ffn in layer.experts]
            yield self._run(networks, layer, x, norm, label="neurons")
        else:
            tiered = [ffn.tiered_bundles for ffn in layer.experts]
            yield from self._run_tiers(self._tiering, layer_idx, tiered, layer, x, norm)
        yield self._sum(layer, self._slot_shares)

    def split_operation(self, layer: DecoderLayer) -> Operation:
        """Which active neurons are hot and which cold; what is on disk is asked for."""
        assert self._tiering is not None
        return self._split(self._tiering, [ffn.tiered_bundles for ffn in layer.experts], layer)

    def cold_operations(
        self, layer_idx: int, layer: DecoderLayer, x: np.ndarray, norm: Norm | None, *, adds_biases: bool
    ) -> Iterator[Operation]:
        """After the split: the cold neurons and their sum with memory.middle; or, where the layer merges before the
        down projection, their values alone. adds_biases: the networks', to that sum.
        """
        assert self._tiering is not None
        networks = [ffn.tiered_bundles for ffn in layer.experts]
        cold: dict[int, Word] = {
            ffn_words.SELECTED: self.cold,
            ffn_words.COUNTS: self.cold_counts,
            ffn_words.BLOCK: self._memory.config.intermediate_size,
            ffn_words.NEEDED: self._needed,
            ffn_words.DISK: self._tiering.cache.words,
            ffn_words.SLOT_SHARES: NUM_SHARES,
        }
        if self._tiering.merges[layer_idx] == "hidden":
            yield self._run(
                networks, layer, x, norm, label="cold neurons", changes=cold | {ffn_words.HIDDEN: self.values}
            )
        else:
            yield self._run(networks, layer, x, norm, label="cold neurons", changes=cold)
            yield self._sum(layer, NUM_SHARES, adds_biases=adds_biases)

    def _run_tiers(
        self,
        tiering: Tiering,
        layer_idx: int,
        networks: Sequence[TieredBundles],
        layer: DecoderLayer,
        x: np.ndarray,
        norm: Norm | None,
    ) -> Iterator[Operation]:
        merge = tiering.merges[layer_idx]
        width = vector_columns(networks[0].row_format, self._memory.config.hidden_size)
        yield self._split(tiering, networks, layer)
        hot: dict[int, Word] = {
            ffn_words.SELECTED: self.hot,
            ffn_words.COUNTS: self.hot_counts,
            ffn_words.BLOCK: self._memory.config.intermediate_size,
        }
        cold: dict[int, Word] = {
            **hot,
            ffn_words.SELECTED: self.cold,
            ffn_words.COUNTS: self.cold_counts,
            ffn_words.SHARES: self._shares[NUM_SHARES * width :],
            ffn_words.NEEDED: self._needed,
            ffn_words.DISK: tiering.cache.words,
        }
        hot[ffn_words.DISK] = tiering.cache.words  # looks after reads, waits for none
        if merge == "hidden":
            cold[ffn_words.HIDDEN] = self.values
        yield self._run(networks, layer, x, norm, label="hot neurons", changes=hot, barrier=False)
        yield self._run(networks, layer, x, norm, label="cold neurons", changes=cold)
        if merge == "hidden":
            yield self._run_down(networks, layer, x, cold)

    def _split(self, tiering: Tiering, networks: Sequence[TieredBundles], layer: DecoderLayer) -> Operation:
        memory = self._memory
        homes = np.array([network.homes.ctypes.data for network in networks], dtype=np.int64)
        offsets = np.array([network.offset for network in networks], dtype=np.int64)
        values: dict[int, Word] = {
            tier_words.SPLIT_NUM_SLOTS: memory.num_slots,
            tier_words.SPLIT_CHOSEN: memory.chosen if layer.router is not None else None,
            tier_words.SPLIT_NUM_NEURONS: memory.config.intermediate_size,
            tier_words.SPLIT_SELECTED: memory.selected,
            tier_words.SPLIT_COUNTS: memory.counts,
            tier_words.SPLIT_BLOCK: memory.block,
            tier_words.SPLIT_HOMES: self._keep(homes),
            tier_words.SPLIT_OFFSETS: self._keep(offsets),
            tier_words.SPLIT_FILE: networks[0].file.descriptor,
            tier_words.SPLIT_BUNDLE_BYTES: networks[0].bundle_bytes,
            tier_words.SPLIT_HOT: self.hot,
            tier_words.SPLIT_HOT_COUNTS: self.hot_counts,
            tier_words.SPLIT_COLD: self.cold,
            tier_words.SPLIT_COLD_COUNTS: self.cold_counts,
            tier_words.SPLIT_READS: self._reads,
            tier_words.SPLIT_NUM_SHARES: NUM_SHARES,
            tier_words.SPLIT_NEEDED: self._needed,
            tier_words.SPLIT_DISK: tiering.cache.words,
        }
        self._kept.append(networks)
        return Operation(kernel("split_neurons"), "split", words(tier_words.SPLIT_WORDS, values))

    def _run(
        self,
        networks: Sequence[Bundles] | Sequence[TieredBundles],
        layer: DecoderLayer,
        x: np.ndarray,
        norm: Norm | None,
        *,
        label: str,
        changes: Mapping[int, Word] = MappingProxyType({}),
        barrier: bool = True,
    ) -> Operation:
        """changes: words that are not as `_words` has them."""
        row_format = networks[0].row_format
        arguments = words(ffn_words.NUM_WORDS, self._words(networks, layer, x, norm) | dict(changes))
        return Operation(kernel("run_neurons", row_format), label, arguments, barrier)

    def _words(
        self,
        networks: Sequence[Bundles] | Sequence[TieredBundles],
        layer: DecoderLayer,
        x: np.ndarray,
        norm: Norm | None,
    ) -> dict[int, Word]:
        memory, config = self._memory, self._memory.config
        table = np.zeros((len(networks), ffn_words.BUNDLE_WORDS), dtype=np.int64)
        for idx in range(len(networks)):
            table[idx] = words(ffn_words.BUNDLE_WORDS, _bundle_words(networks[idx]))
        self._kept.append(networks)
        return memory.vector_words(x, norm, networks[0].row_format, config.hidden_size) | {
            ffn_words.NUM_SLOTS: memory.num_slots,
            ffn_words.BUNDLES: self._keep(table),
            ffn_words.CHOSEN: memory.chosen if layer.router is not None else None,
            ffn_words.NUM_NEURONS: config.intermediate_size,
            ffn_words.HAS_GATE: int(config.activation.is_gated),
            ffn_words.ACTIVATION: ACTIVATION_KINDS.index(config.activation.kind),
            ffn_words.THRESHOLD: float(config.activation.threshold),
            ffn_words.SELECTED: memory.selected,
            ffn_words.COUNTS: memory.counts,
            ffn_words.BLOCK: memory.block,
            ffn_words.NUM_SHARES: NUM_SHARES,
            ffn_words.SHARES: self._shares,
            ffn_words.READ_ROWS: memory.read_rows,
            ffn_words.LISTS: self._lists,
            ffn_words.LIST_SIZE: self._lists.shape[2],
            ffn_words.SLOT_SHARES: self._slot_shares,
        }

    def _run_down(
        self, networks: Sequence[TieredBundles], layer: DecoderLayer, x: np.ndarray, cold: dict[int, Word]
    ) -> Operation:
        homes = np.array([network.down_homes.ctypes.data for network in networks], dtype=np.int64)
        values: dict[int, Word] = {
            tier_words.DOWN_HOMES: self._keep(homes),
            tier_words.DOWN_SELECTED: self.cold,
            tier_words.DOWN_COUNTS: self.cold_counts,
        }
        arguments = words(tier_words.DOWN_WORDS, self._words(networks, layer, x, None) | cold | values)
        return Operation(kernel("run_down", networks[0].row_format), "down rows", arguments)

    def _sum(self, layer: DecoderLayer, slot_shares: int, *, adds_biases: bool = True) -> Operation:
        memory, config = self._memory, self._memory.config
        networks = [ffn.bundles for ffn in layer.experts]
        row_format = networks[0].row_format
        order = np.array(packed_columns(row_format) if row_format.is_quantized else [0], dtype=np.int32)
        biases = np.array([0 if b.down_bias is None else b.down_bias.data_ptr() for b in networks], dtype=np.int64)
        is_mixture = layer.router is not None
        values: dict[int, Word] = {
            ffn_words.SUM_X: memory.middle,
            ffn_words.SUM_OUTPUT: memory.stream,
            ffn_words.SUM_SHARES: self._shares,
            ffn_words.SUM_NUM_SLOTS: memory.num_slots,
            ffn_words.SUM_NUM_SHARES: slot_shares,
            ffn_words.SUM_COLUMNS: config.hidden_size,
            ffn_words.SUM_VECTOR_COLUMNS: vector_columns(row_format, config.hidden_size),
            ffn_words.SUM_GROUP: len(order),
            ffn_words.SUM_ORDER: self._keep(order),
            ffn_words.SUM_WEIGHTS: memory.expert_weights if is_mixture else None,
            ffn_words.SUM_CHOSEN: memory.chosen if is_mixture else None,
            ffn_words.SUM_BIASES: self._keep(biases) if adds_biases and biases.any() else None,
            ffn_words.SUM_SCRATCH: memory.scratch,
            ffn_words.SUM_SCRATCH_STRIDE: memory.scratch_stride,
        }
        self._kept.append(biases)
        return Operation(kernel("sum_shares"), "neurons", words(ffn_words.SUM_WORDS, values))

    def _keep(self, array: np.ndarray) -> np.ndarray:
        self._kept.append(array)
        return array


def _bundle_words(bundles: Bundles | TieredBundles) -> dict[int, Word]:
    biases: dict[int, Word] = {ffn_words.GATE_BIAS: bundles.gate_bias, ffn_words.UP_BIAS: bundles.up_bias}
    if isinstance(bundles, TieredBundles):
        return biases | {ffn_words.HOMES: bundles.homes, ffn_words.ROW_STRIDE: bundles.hot.shape[2]}
    strides = {ffn_words.BUNDLE_STRIDE: bundles.data.stride(0), ffn_words.ROW_STRIDE: bundles.data.stride(1)}
    return biases | strides | {ffn_words.DATA: bundles.data}
