"""Several tokens through a layer that is led by the GPU: dense products of weights that are unpacked for the moment.

The GPU computes its own neurons; cold ones either come to it, a block at a time while it computes the one before, or
are computed by the CPU, whichever is sooner: many tokens are worth a copy, few are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from hybrid_kernels.activation import Activation, activate
from hybrid_kernels.attention.gpu import LayerCache, attention
from hybrid_kernels.linear.gpu import MOST_VECTORS, dequantize, linear
from hybrid_kernels.packed_matrix import Bundles, PackedMatrix
from hybrid_kernels.rope.gpu import rotate_and_append
from hybrid_kernels.sparse_ffn.gpu import MOST_TOKENS, sparse_ffn
from hybrid_kernels.team import Team
from hybrid_kernels.tiers.gpu import HotNetworks
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.gpu.device import GpuDevice
from hybrid_runtime.gpu.layer import GpuLayer, GpuPredictor, Taps, apply_norm, choose_experts
from hybrid_runtime.gpu.rotation import Rotation
from hybrid_runtime.model.tiered_ffn import tiered_ffn
from hybrid_runtime.tiers.bundles import TieredBundles

QUERIES = 32  # tokens that attend at a time: what they have so far takes some megabytes each
ROWS = 2048  # of weights that are unpacked at a time
NUM_BUFFERS = 2


@dataclass(frozen=True, slots=True)
class Batch:
    """positions: int32 [T], on the GPU; rotation: of all positions; crosses: whether cold neurons come to the GPU."""

    positions: torch.Tensor
    rotation: Rotation | None
    crosses: bool


def batch_layer(
    config: ModelConfig,
    layer: GpuLayer,
    networks: HotNetworks,
    bundles: Sequence[TieredBundles],
    x: torch.Tensor,
    batch: Batch,
    cache: LayerCache,
    device: GpuDevice,
    team: Team,
) -> torch.Tensor:
    """x: float32 [T, H] on the GPU -> the same after the layer. bundles: all of the layer's networks' neurons."""
    taps = _attend(config, layer, x, batch, cache)
    slots = config.num_experts_per_tok if layer.weights.router is not None else 1
    experts, weights = (each.view(len(x), slots) for each in choose_experts(config, layer, taps))
    predictor_input = taps.at(config.predictor_input or "post_norm")
    output = taps.pre_norm.clone()
    here = experts.cpu()
    for expert_idx in sorted(set(here.flatten().tolist())):
        rows, places = (here == expert_idx).nonzero(as_tuple=True)
        tokens, slot = rows.to(x.device), places.to(x.device)
        active = None
        if layer.predictor is not None:
            active = _active(layer.predictor, expert_idx, predictor_input[tokens])
        of_expert = _Network(config.activation, networks, bundles[expert_idx], expert_idx)
        found = of_expert.hot(taps.post_norm[tokens], active)
        cold = of_expert.crossed if batch.crosses else of_expert.cold
        found += cold(taps.post_norm[tokens], active, device, team)
        output[tokens] += found * weights[tokens, slot].unsqueeze(1)
    return output


def _attend(config: ModelConfig, layer: GpuLayer, x: torch.Tensor, batch: Batch, cache: LayerCache) -> Taps:
    weights = layer.weights
    normed = apply_norm(config, weights.input_layernorm, x)
    query, keys, values = (
        dense_linear(normed, projection.weight, projection.bias).view(len(x), -1, config.head_dim)
        for projection in (weights.q_proj, weights.k_proj, weights.v_proj)
    )
    turns = batch.rotation if config.rotates(layer.layer_idx) else None
    rotate_and_append(query, keys, values, turns, batch.positions, cache)
    window = config.window(layer.layer_idx)
    mixed = torch.cat([
        attention(query[start : start + QUERIES], cache, batch.positions[start : start + QUERIES], window)
        for start in range(0, len(x), QUERIES)
    ])  # fmt: skip
    middle = x + dense_linear(mixed.view(len(x), -1), weights.o_proj.weight, weights.o_proj.bias)
    return Taps(x, middle, apply_norm(config, weights.post_attention_layernorm, middle))


def dense_linear(x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x: float32 [T, K] -> float32 [T, N]; of more vectors than `linear` takes by a product of unpacked matrices."""
    if len(x) <= MOST_VECTORS:
        return linear(x.contiguous(), weight, bias)
    blocks = (weight.slice_rows(start, start + ROWS) for start in range(0, weight.num_rows, ROWS))
    y = torch.cat([_product(x, dequantize(block)) for block in blocks], dim=1)
    return y if bias is None else y + bias


def _product(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """x: float32 [T, K]; weights: [N, K], float16 or float32, which the product is computed in -> float32 [T, N]."""
    return (x.to(weights.dtype) @ weights.T).float()


def _active(predictor: GpuPredictor, expert_idx: int, x: torch.Tensor) -> torch.Tensor:
    """bool [n, I]."""
    hidden = dense_linear(x, predictor.fc1.of(0 if predictor.shares_fc1 else expert_idx))
    if predictor.has_relu:
        hidden = torch.relu(hidden)
    bias = predictor.fc2.bias
    logits = dense_linear(hidden, predictor.fc2.of(expert_idx), None if bias is None else bias[expert_idx])
    return logits > predictor.threshold


@dataclass(frozen=True, slots=True)
class _Network:
    """One expert: its neurons on both sides."""

    activation: Activation
    networks: HotNetworks
    bundles: TieredBundles
    expert_idx: int

    def hot(self, x: torch.Tensor, active: torch.Tensor | None) -> torch.Tensor:
        """x: float32 [n, H]; active: bool [n, I] -> [n, H], with the bias of the output."""
        rows = self.networks.rows[self.expert_idx]
        (neurons,) = (rows >= 0).nonzero(as_tuple=True)
        y = torch.zeros_like(x)
        if len(neurons):
            first = int(rows[neurons[0]])  # a network's lie side by side, in their order
            data = self.networks.data[first : first + len(neurons)]
            computed = self._few if len(x) <= MOST_TOKENS and self.activation.is_sparse else self._computed
            y = computed(x, neurons, data, active)
        down_bias = self.networks.down_bias
        return y if down_bias is None else y + down_bias[self.expert_idx]

    def cold(self, x: torch.Tensor, active: torch.Tensor | None, device: GpuDevice, team: Team) -> torch.Tensor:
        """The rest, by the CPU."""
        del device
        y = tiered_ffn(x.cpu(), self._without_bias(), self.activation, self._cold(x, active).cpu(), team=team)
        return y.to(x.device)

    def crossed(self, x: torch.Tensor, active: torch.Tensor | None, device: GpuDevice, team: Team) -> torch.Tensor:
        """The rest, by the GPU: what any token needs comes to it, block by block."""
        del team
        wanted = self._cold(x, active)
        y = torch.zeros_like(x)
        for neurons, data in _crossing(self.bundles, wanted.any(dim=0).nonzero()[:, 0].cpu(), device):
            y += self._computed(x, neurons, data, wanted)
        return y

    def _without_bias(self) -> TieredBundles:
        return replace(self.bundles, down_bias=None)

    def _cold(self, x: torch.Tensor, active: torch.Tensor | None) -> torch.Tensor:
        """bool [n, I]: active ones that are not on the GPU."""
        is_cold = self.networks.rows[self.expert_idx] < 0
        return is_cold.expand(len(x), -1) if active is None else active & is_cold

    def _few(
        self, x: torch.Tensor, neurons: torch.Tensor, data: torch.Tensor, active: torch.Tensor | None
    ) -> torch.Tensor:
        """As `_computed`; reads those alone that any of the tokens needs."""
        selected = torch.ones(len(x), len(neurons), dtype=torch.bool, device=x.device)
        return sparse_ffn(
            x.contiguous(),
            self._bundles(data, neurons),
            self.activation,
            selected if active is None else active[:, neurons],
        )

    def _computed(
        self, x: torch.Tensor, neurons: torch.Tensor, data: torch.Tensor, active: torch.Tensor | None
    ) -> torch.Tensor:
        """neurons: int64 [m], whose bundles are data: uint8 [m, parts, row_bytes], on the GPU."""
        total = torch.zeros_like(x)
        for start in range(0, len(neurons), ROWS):
            some = neurons[start : start + ROWS]
            block = self._bundles(data[start : start + ROWS], some)
            up = dense_linear(x, block.up_proj, block.up_bias)
            gate = dense_linear(x, block.gate_proj, block.gate_bias) if block.has_gate else None
            values = activate(self.activation, gate, up)
            if active is not None:
                values = values * active[:, some]
            down = dequantize(block.down_proj_t)
            # beyond float16 are products of activations, sometimes: those are computed in float32
            total += (values @ down.float()) if down.dtype == torch.float16 else values @ down
        return total

    def _bundles(self, data: torch.Tensor, neurons: torch.Tensor) -> Bundles:
        """Without the bias of the output."""
        networks = self.networks
        return Bundles(
            data,
            networks.hidden_size,
            networks.row_format,
            gate_bias=self._bias(networks.gate_bias, neurons),
            up_bias=self._bias(networks.up_bias, neurons),
        )

    def _bias(self, biases: torch.Tensor | None, neurons: torch.Tensor) -> torch.Tensor | None:
        return None if biases is None else biases[self.expert_idx][neurons]


def _crossing(
    bundles: TieredBundles, neurons: torch.Tensor, device: GpuDevice
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """neurons: int64 [m]. Yields some of them and their bundles, on the GPU: while it computes these, the next come.

    A buffer is filled again when its copy is done, which is behind the work before it.
    """
    buffers: list[torch.Tensor | None] = [None] * NUM_BUFFERS
    marks: list[torch.cuda.Event | None] = [None] * NUM_BUFFERS
    for turn, (some, block) in enumerate(bundles.gathered(neurons)):
        idx = turn % NUM_BUFFERS
        device.wait(marks[idx])
        if not device.is_cuda:
            yield some, block.data
            continue
        buffer = buffers[idx]
        if buffer is None or len(buffer) < block.data.numel():
            buffer = buffers[idx] = device.host_memory(block.data.numel(), torch.uint8)
        pinned = buffer[: block.data.numel()].view_as(block.data)
        pinned.copy_(block.data)
        there = pinned.to(device.torch_device, non_blocking=True)
        marks[idx] = device.mark()
        yield some.to(device.torch_device), there
