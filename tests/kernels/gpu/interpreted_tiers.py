"""The GPU's part of networks spread over tiers, in Triton's interpreter (see interpreted.py)."""

import pytest
import torch

from hybrid_kernels.activation import Activation
from hybrid_kernels.activation_kinds import ACTIVATION_KINDS
from hybrid_kernels.linear import reference as linear_reference
from hybrid_kernels.packed_matrix import Bundles
from hybrid_kernels.quantization.reference import quantize_rows
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.sparse_ffn import reference as ffn_reference
from hybrid_kernels.tiers.gpu import (
    ExpertMatrices,
    HotNetworks,
    add_cold_down_rows,
    add_down_rows,
    expert_linear,
    hot_values,
    merge,
    new_partial,
    split,
)

FORMATS = [RowFormat("q4", 32), RowFormat("q8", 64), RowFormat("bf16"), RowFormat("f32")]
TOLERANCE = {"q4": 2e-3, "q8": 2e-3, "bf16": 1e-5, "f32": 1e-5}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found, expected, row_format):
    size = float(expected.square().mean().sqrt())
    assert float((found - expected).abs().max()) <= TOLERANCE[row_format.kind] * size * 4


class Layer:
    """Networks of random weights, whose neurons are on the GPU with a chance; the rest is cold."""

    def __init__(self, row_format, activation, *, num_experts=3, num_neurons=70, hidden_size=96, hot=0.5, bias=False):
        parts = 3 if activation.is_gated else 2
        self.activation, self.num_experts = activation, num_experts
        rows = quantize_rows(random(num_experts * num_neurons * parts, hidden_size), row_format)
        data = rows.view(num_experts, num_neurons, parts, -1)
        biases = dict.fromkeys(("gate_bias", "up_bias"), None)
        if bias:
            biases = {"up_bias": random(num_experts, num_neurons, seed=3), "gate_bias": None}
            if activation.is_gated:
                biases["gate_bias"] = random(num_experts, num_neurons, seed=4)
        self.down_bias = random(num_experts, hidden_size, seed=5) if bias else None
        self.is_hot = torch.rand(num_experts, num_neurons, generator=torch.Generator().manual_seed(9)) < hot
        self.networks = HotNetworks(
            data[self.is_hot],
            numbered(self.is_hot),
            int(self.is_hot.sum(1).max()),
            hidden_size,
            row_format,
            down=data[~self.is_hot][:, -1].contiguous(),
            down_of=numbered(~self.is_hot),
            down_bias=self.down_bias,
            **biases,
        )
        self.bundles = [
            Bundles(data[idx], hidden_size, row_format, **{
                name: None if each is None else each[idx] for name, each in biases.items()
            })
            for idx in range(num_experts)
        ]  # fmt: skip

    def expected(self, x, experts, weights, active):
        """active: bool [P, I] -> [T, H]."""
        slots = len(experts) // len(x)
        y = torch.zeros_like(x)
        for pair, expert in enumerate(experts.tolist()):
            token = pair // slots
            own = active[pair : pair + 1]
            found = ffn_reference.sparse_ffn(x[token : token + 1], self.bundles[expert], self.activation, own)[0]
            y[token] += weights[pair] * (found + (0 if self.down_bias is None else self.down_bias[expert]))
        return y

    def split(self, experts, logits):
        num_pairs, num_neurons = len(experts), self.networks.num_neurons
        cold = torch.full((num_pairs, num_neurons), -1, dtype=torch.int32)
        return split(self.networks, experts, logits, 0.0, cold, torch.zeros(num_pairs, dtype=torch.int64))


def numbered(mask):
    """int32: which of those in the mask each is; -1 for all others."""
    numbers = torch.full(mask.shape, -1, dtype=torch.int32)
    numbers[mask] = torch.arange(int(mask.sum()), dtype=torch.int32)
    return numbers


@pytest.mark.parametrize("row_format", FORMATS, ids=str)
@pytest.mark.parametrize("has_relu", [False, True])
def test_expert_linear(row_format, has_relu):
    num_experts, num_rows, columns = 3, 37, 96
    rows = quantize_rows(random(num_experts * (num_rows + 1), columns), row_format).view(num_experts, num_rows + 1, -1)
    bias = random(num_experts, num_rows, seed=2)
    matrices = ExpertMatrices(
        rows[:, :num_rows], columns, row_format, bias
    )  # a row that is none of theirs between them
    x, experts = random(2, columns, seed=1), torch.tensor([2, 0, 1, 1], dtype=torch.int32)
    found = expert_linear(x, matrices, experts, has_relu=has_relu)
    for pair, expert in enumerate(experts.tolist()):
        expected = linear_reference.linear(x[pair // 2 : pair // 2 + 1], matrices.of(expert), bias[expert])[0]
        assert_close(found[pair], torch.relu(expected) if has_relu else expected, row_format)


@pytest.mark.parametrize("hot", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("predicted", [False, True])
def test_split_lists_every_active_neuron_once_in_order(hot, predicted):
    layer = Layer(RowFormat("f32"), Activation("drelu"), num_neurons=1300, hidden_size=32, hot=hot)
    experts = torch.tensor([2, 1, 2], dtype=torch.int32)
    logits = random(3, 1300, seed=6) if predicted else None
    lists = layer.split(experts, logits)
    for pair, expert in enumerate(experts.tolist()):
        active = torch.ones(1300, dtype=torch.bool) if logits is None else logits[pair] > 0
        is_hot = layer.is_hot[expert]
        assert lists.hot[pair, : lists.hot_counts[pair]].tolist() == (active & is_hot).nonzero()[:, 0].tolist()
        assert lists.cold[pair, : lists.cold_counts[pair]].tolist() == (active & ~is_hot).nonzero()[:, 0].tolist()


def both_sides(layer, x, experts, weights, logits, *, merges_hidden):
    """What the GPU makes of its neurons, and, by its own down rows, of values that the CPU would send."""
    networks, activation = layer.networks, layer.activation
    lists = layer.split(experts, logits)
    hidden = hot_values(x, networks, activation, experts, lists)
    partial = new_partial(networks, len(experts), merges_hidden=merges_hidden)
    add_down_rows(hidden, networks, experts, lists, partial)
    cold = None
    active = torch.ones(hidden.shape, dtype=torch.bool) if logits is None else logits > 0
    is_cold = ~layer.is_hot[experts.long()]
    if merges_hidden:
        values = torch.full(hidden.shape, float("nan"))  # of what is not listed nothing is read
        for pair, expert in enumerate(experts.tolist()):

            def see(which, found, pair=pair):
                values[pair, which] = found[0]

            own = (active & is_cold)[pair : pair + 1]
            token = pair * len(x) // len(experts)
            ffn_reference.sparse_ffn(x[token : token + 1], layer.bundles[expert], activation, own, observe=see)
        add_cold_down_rows(values, networks, experts, lists, partial)
    else:
        without_bias = layer.down_bias
        layer.down_bias = None
        cold = layer.expected(x, experts, weights, active & is_cold)
        layer.down_bias = without_bias
    return merge(
        partial, networks, experts, weights, cold=cold, residual=2 * x, num_tokens=len(x)
    ), 2 * x + layer.expected(x, experts, weights, active)  # fmt: skip


@pytest.mark.parametrize("row_format", FORMATS, ids=str)
@pytest.mark.parametrize("merges_hidden", [False, True], ids=["output", "hidden"])
def test_both_sides_make_what_one_would(row_format, merges_hidden):
    layer = Layer(row_format, Activation("drelu"))
    x, experts = random(2, 96, seed=1), torch.tensor([2, 0, 1, 2], dtype=torch.int32)
    weights, logits = torch.rand(4, generator=torch.Generator().manual_seed(7)), random(4, 70, seed=6)
    found, expected = both_sides(layer, x, experts, weights, logits, merges_hidden=merges_hidden)
    assert_close(found, expected, row_format)
    again, _ = both_sides(layer, x, experts, weights, logits, merges_hidden=merges_hidden)
    assert torch.equal(found, again)


@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_every_activation(kind, bias):
    row_format = RowFormat("f32")
    layer = Layer(row_format, Activation(kind, 0.3 if kind == "fatrelu" else 0.0), num_experts=1, bias=bias)
    x, experts = random(1, 96, seed=1), torch.zeros(1, dtype=torch.int32)
    found, expected = both_sides(layer, x, experts, torch.ones(1), None, merges_hidden=False)
    assert_close(found, expected, row_format)


@pytest.mark.parametrize("hot", [0.0, 1.0])
def test_layers_of_which_one_side_has_all(hot):
    row_format = RowFormat("q8", 32)
    layer = Layer(row_format, Activation("relu_glu"), hot=hot)
    x, experts = random(1, 96, seed=1), torch.tensor([1, 2], dtype=torch.int32)
    found, expected = both_sides(layer, x, experts, torch.tensor([0.3, 0.7]), None, merges_hidden=False)
    assert_close(found, expected, row_format)
