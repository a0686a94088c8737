"""One token through a model that is on both sides: what either does, and what goes between them.

A layer whose attention is on the GPU is led by it: attention, router and predictor run there, the cold part of the
active neurons is told to the CPU, and both compute their neurons at the same time. A layer whose attention is on the
CPU is led by that. Either way a layer waits once for each side:

    led by the GPU   attend, choose, split ... message -> hot values and sums | cold ones on the CPU -> merged there
    led by the CPU   attend, choose, split ... message -> cold ones | hot values and sums on the GPU -> merged here

Where a layer merges before the down projection (`hidden`), the cold neurons' values go to the GPU, which has their down
rows; where the GPU has all of a layer's neurons, nothing goes anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from hybrid_kernels.attention.gpu import LayerCache
from hybrid_kernels.linear.gpu import linear
from hybrid_kernels.team import Team
from hybrid_kernels.tiers.gpu import (
    HotNetworks,
    Lists,
    add_cold_down_rows,
    add_down_rows,
    hot_values,
    merge,
    new_partial,
    split,
)
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.gpu.device import GpuDevice
from hybrid_runtime.gpu.layer import GpuLayer, Taps, apply_norm, attend, choose_experts, predict
from hybrid_runtime.gpu.messages import Message
from hybrid_runtime.gpu.rotation import Rotation, RotationTables
from hybrid_runtime.gpu.steps import Steps
from hybrid_runtime.model.kv_cache import KvCache
from hybrid_runtime.model.neuron_operations import NeuronOperations
from hybrid_runtime.model.rope_frequencies import rope_frequencies
from hybrid_runtime.model.token_memory import TokenMemory, padded
from hybrid_runtime.model.token_operations import TokenOperations
from hybrid_runtime.model.weights import DecoderWeights, Norm
from hybrid_runtime.tiers.tiering import Tiering


@dataclass(frozen=True, slots=True)
class GpuSide:
    """What of a model is on the GPU. layers: those whose attention is there; networks: of every layer that has hot
    neurons or is led there; norms: after attention, of the others; head: its norm, where it is there; rotations: of
    the layers that are led there.
    """

    device: GpuDevice
    layers: Mapping[int, GpuLayer]
    networks: Mapping[int, HotNetworks]
    norms: Mapping[int, Norm]
    head: Norm | None
    rotations: RotationTables


@dataclass(slots=True)
class _Turn:
    """What a layer's works leave for those after them, on the GPU."""

    taps: Taps | None = None
    experts: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    weights: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    lists: Lists | None = None
    partial: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class TokenScript:
    """Of one decoder with one cache. `step` computes one token, as TokenProgram's does. crossed_bytes: that a token
    sends over the bus.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        side: GpuSide,
        cache: KvCache,
        caches: Mapping[int, LayerCache],
        team: Team,
        *,
        masks: bool,
    ) -> None:
        assert weights.tiering is not None
        self._config, self._weights, self._side, self._caches = config, weights, side, caches
        self._tiering: Tiering = weights.tiering
        self._masks = masks
        device = side.device
        self._operations = TokenOperations(config, weights, cache, team, masks=masks, zeros=device.host_zeros)
        self.step_s = 0.0
        self.crossed_bytes = 0
        memory = self._operations.memory
        slots, hidden, neurons = memory.num_slots, config.hidden_size, config.intermediate_size
        self._message = Message(device, slots, hidden, neurons)
        self._position = device.host_memory(1, torch.int32)
        self._positions = torch.zeros(1, dtype=torch.int32, device=device.torch_device)
        self._stream_here = device.host_memory(padded(hidden), torch.float32)
        self._back_here = device.host_memory(padded(hidden), torch.float32)
        self._logits_here = device.host_memory(config.vocab_size, torch.float32)
        self._x = torch.zeros(1, hidden, device=device.torch_device)
        self._hot_neurons = torch.zeros(1, dtype=torch.int64, device=device.torch_device)
        self._num_positions = cache.num_positions
        self._rotation: Rotation | None = None
        self._rotate(1)
        self._cold = self._cold_operations(team.num_threads)
        self.steps = Steps(device, team)
        self._fill()

    @property
    def read_rows(self) -> np.ndarray:
        """int64 [workers, 8]: gate, up and down rows that each has read, on the CPU."""
        return self._operations.read_rows

    @property
    def program(self) -> Steps:
        """What there is to look at."""
        return self.steps

    def hot_neurons(self) -> int:
        """Active neurons of layers that the GPU leads by predictors, since the beginning."""
        return int(self._hot_neurons)

    def step(self, token: int, position: int, num_positions: int) -> torch.Tensor:
        """Logits [V] float32 after one more token; the tensor is overwritten by the next step."""
        self._operations.set_token(token, position, num_positions)
        self._position[0] = position
        if self._config.rope is not None and self._config.rope.kind == "longrope" and self._rotate(num_positions):
            self.steps.record_again()  # what was recorded has the other tables' addresses
        started_s = time.perf_counter()
        self.steps.run()
        self.step_s = time.perf_counter() - started_s
        return self._operations.logits if self._side.head is None else self._logits_here

    def _cold_operations(self, num_threads: int) -> NeuronOperations:
        """Of layers that the GPU leads: they read its message and leave their sum, or their values, for it."""
        shared, here = self._operations.memory, self._message.here
        memory = TokenMemory(
            self._config,
            stream=self._back_here.numpy(),
            middle=np.zeros(len(self._back_here), dtype=np.float32),
            chosen=here.chosen.numpy(),
            expert_weights=here.weights.numpy(),
            selected=here.cold.numpy() if self._masks else None,
            counts=here.counts.numpy()[:, None],
            block=self._config.intermediate_size,
            scratch=shared.scratch,
            scratch_stride=shared.scratch_stride,
            read_rows=shared.read_rows,
        )
        return NeuronOperations(memory, num_threads, self._tiering, self._side.device.host_zeros)

    def _fill(self) -> None:
        """All steps of a token. The stream changes sides where a layer's attention is on another one than before."""
        steps, is_there = self.steps, False
        steps.launch(self._take_position)
        steps.compute([self._operations.begin()])
        for layer_idx in range(self._config.num_hidden_layers):
            if layer_idx in self._side.layers:
                if not is_there:
                    self._send_stream()
                self._led_by_gpu(layer_idx, self._side.layers[layer_idx])
            else:
                if is_there:
                    self._fetch_stream()
                self._led_by_cpu(layer_idx)
            is_there = layer_idx in self._side.layers
        if self._side.head is not None:
            if not is_there:
                self._send_stream()
            self.crossed_bytes += 4 * self._config.vocab_size
            steps.launch(self._head)
            steps.mark()
            steps.wait()
        else:
            if is_there:
                self._fetch_stream()
            steps.compute([self._operations.head()])
        steps.end()

    def _rotate(self, num_positions: int) -> bool:
        """By what sequences of that length are rotated by. Whether that is something else than before."""
        rope, before = self._config.rope, self._rotation
        if rope is not None and self._side.layers:
            frequencies = rope_frequencies(rope, self._config.head_dim, num_positions)
            self._rotation = self._side.rotations.of(frequencies, self._num_positions)
        return self._rotation is not before

    def _take_position(self) -> None:
        self._positions.copy_(self._position, non_blocking=True)

    def _send_stream(self) -> None:
        stream, here = torch.from_numpy(self._operations.memory.stream), self._stream_here
        self.crossed_bytes += 4 * self._config.hidden_size

        def take() -> None:
            self._x = here[: self._config.hidden_size].to(self._positions.device, non_blocking=True).view(1, -1)

        self.steps.host(lambda: _assign(here, stream))
        self.steps.launch(take)

    def _fetch_stream(self) -> None:
        stream, here = torch.from_numpy(self._operations.memory.stream), self._stream_here
        width = self._config.hidden_size
        self.crossed_bytes += 4 * width
        self.steps.launch(lambda: _assign(here[:width], self._x.view(-1)))
        self.steps.mark()
        self.steps.wait()
        self.steps.host(lambda: _assign(stream[:width], here[:width]))

    def _head(self) -> None:
        assert self._side.head is not None
        normed = apply_norm(self._config, self._side.head, self._x)
        self._logits_here.copy_(linear(normed, self._weights.lm_head).view(-1), non_blocking=True)

    def _led_by_gpu(self, layer_idx: int, layer: GpuLayer) -> None:
        steps, turn, networks = self.steps, _Turn(), self._side.networks[layer_idx]
        merges = self._tiering.merges[layer_idx]
        has_cold = merges != "gpu"

        def lead() -> None:
            self._lead(layer, networks, turn, tells=has_cold)

        def hot() -> None:
            turn.partial = self._hot(networks, turn, turn.taps.post_norm, merges_hidden=merges == "hidden")  # type: ignore[union-attr]

        def meet() -> None:
            cold = None
            if merges == "hidden":
                self._add_cold_values(self._cold, networks, turn)
            elif has_cold:
                cold = self._back_here[: self._config.hidden_size].to(self._x.device, non_blocking=True).view(1, -1)
            assert turn.taps is not None
            self._x = merge(turn.partial, networks, turn.experts, turn.weights, cold=cold, residual=turn.taps.pre_norm)

        steps.launch(lead)
        if has_cold:
            back = self._cold.values if merges == "hidden" else self._operations.memory.stream
            self.crossed_bytes += self._message.sent_bytes(with_lists=self._masks) + back.nbytes
            steps.mark()
        steps.launch(hot)
        if has_cold:
            steps.wait()
            operations, decoder_layer = self._cold, self._weights.layers[layer_idx]
            x = self._message.here.x.numpy()
            steps.compute([operations.split_operation(decoder_layer)])
            steps.compute(list(operations.cold_operations(layer_idx, decoder_layer, x, None, adds_biases=False)))
        steps.launch(meet)

    def _lead(self, layer: GpuLayer, networks: HotNetworks, turn: _Turn, *, tells: bool) -> None:
        """Up to the lists. tells: the CPU, which has the others."""
        config, there = self._config, self._message.there
        cache = self._caches[layer.layer_idx]
        turn.taps = taps = attend(config, layer, self._x, self._positions, self._rotation, cache)
        turn.experts, turn.weights = choose_experts(config, layer, taps)
        logits, threshold = None, 0.0
        if layer.predictor is not None:
            logits = predict(layer.predictor, taps.at(config.predictor_input or "post_norm"), turn.experts)
            threshold = layer.predictor.threshold
        # without predictors the CPU sees and counts them, if it hears of the layer at all
        counter = None if logits is None and tells else self._hot_neurons
        turn.lists = split(networks, turn.experts, logits, threshold, there.cold, there.counts, counter)
        if tells:
            there.x[: config.hidden_size].copy_(taps.post_norm.view(-1))
            there.chosen.copy_(turn.experts)
            there.weights.copy_(turn.weights)
            self._message.send(with_lists=logits is not None)

    def _hot(self, networks: HotNetworks, turn: _Turn, x: torch.Tensor, *, merges_hidden: bool) -> torch.Tensor:
        assert turn.lists is not None
        partial = new_partial(networks, len(turn.experts), merges_hidden=merges_hidden)
        if networks.most:
            hidden = hot_values(x, networks, self._config.activation, turn.experts, turn.lists)
            add_down_rows(hidden, networks, turn.experts, turn.lists, partial)
        return partial

    def _add_cold_values(self, operations: NeuronOperations, networks: HotNetworks, turn: _Turn) -> None:
        assert turn.lists is not None
        values = torch.from_numpy(operations.values).to(self._x.device, non_blocking=True)
        add_cold_down_rows(values, networks, turn.experts, turn.lists, turn.partial)

    def _led_by_cpu(self, layer_idx: int) -> None:
        steps, operations, layer = self.steps, self._operations, self._weights.layers[layer_idx]
        merges, neurons = self._tiering.merges[layer_idx], operations.neurons
        steps.compute([*operations.attention(layer_idx), *operations.selection(layer_idx)])
        steps.compute([neurons.split_operation(layer)])
        x, norm = operations.tap("post_norm", layer)
        cold = list(neurons.cold_operations(layer_idx, layer, x, norm, adds_biases=True))
        if merges == "none":
            steps.compute(cold)
            return
        networks, turn = self._side.networks[layer_idx], _Turn()
        if merges == "output":
            networks = replace(networks, down_bias=None)  # which the CPU's sum has
        lists = (neurons.hot, neurons.cold, *((neurons.values,) if merges == "hidden" else ()))
        self.crossed_bytes += sum(each.nbytes for each in lists) + 2 * operations.memory.stream.nbytes
        steps.host(lambda: self._tell_gpu(is_mixture=layer.router is not None))
        steps.launch(lambda: self._follow(layer_idx, networks, turn, merges_hidden=merges == "hidden"))
        if merges == "gpu":
            steps.launch(lambda: self._return(networks, turn))
        if merges == "output":
            steps.launch(lambda: self._return(networks, turn))
            steps.mark()
        if merges != "gpu":
            steps.compute(cold)
        if merges == "hidden":
            steps.launch(lambda: self._add_cold_values(neurons, networks, turn))
            steps.launch(lambda: self._return(networks, turn))
        if merges != "output":
            steps.mark()
        steps.wait()
        memory, width = operations.memory, self._config.hidden_size
        before = torch.from_numpy(memory.stream if merges == "output" else memory.middle)[:width]
        stream, back = torch.from_numpy(memory.stream)[:width], self._stream_here[:width]
        steps.host(lambda: _add(stream, before, back))

    def _tell_gpu(self, *, is_mixture: bool) -> None:
        """The stream before its norm, and the experts; the lists are where the GPU copies them from."""
        memory, here = self._operations.memory, self._message.here
        _assign(here.x, torch.from_numpy(memory.middle))
        _assign(here.chosen, torch.from_numpy(memory.chosen))
        if is_mixture:
            _assign(here.weights, torch.from_numpy(memory.expert_weights)[: memory.num_slots])
        else:
            here.weights.fill_(1.0)

    def _follow(self, layer_idx: int, networks: HotNetworks, turn: _Turn, *, merges_hidden: bool) -> None:
        """The hot neurons of a layer that the CPU leads."""
        here, device, config = self._message.here, self._x.device, self._config
        neurons = self._operations.neurons
        middle = here.x[: config.hidden_size].to(device, non_blocking=True).view(1, -1)
        turn.experts = here.chosen.to(device, non_blocking=True).int()
        turn.weights = here.weights.to(device, non_blocking=True)
        hot, hot_counts, cold, cold_counts = (
            torch.from_numpy(each).to(device, non_blocking=True)
            for each in (neurons.hot, neurons.hot_counts, neurons.cold, neurons.cold_counts)
        )
        turn.lists = Lists(hot, hot_counts.int(), cold, cold_counts)
        x = apply_norm(config, self._side.norms[layer_idx], middle)
        turn.partial = self._hot(networks, turn, x, merges_hidden=merges_hidden)

    def _return(self, networks: HotNetworks, turn: _Turn) -> None:
        back = merge(turn.partial, networks, turn.experts, turn.weights)
        self._stream_here[: self._config.hidden_size].copy_(back.view(-1), non_blocking=True)


def _assign(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)


def _add(target: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> None:
    torch.add(first, second, out=target)
