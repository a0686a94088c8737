"""run_neurons and sum_shares: one token's feed-forward network against the references, roundings included."""

import pytest
import torch

from hybrid_kernels.activation import ACTIVATION_KINDS, Activation, activate
from hybrid_kernels.linear.reference import rounded_linear
from hybrid_kernels.packed_matrix import Bundles
from hybrid_kernels.packed_order import MOST_ROWS
from hybrid_kernels.quantization.reference import dequantize_rows, quantize_rows
from hybrid_kernels.quantization.row_format import GROUP_SIZES, RowFormat
from hybrid_kernels.sparse_ffn import reference

from .kernel_calls import decode_ffn

FORMATS = [
    RowFormat("f32"),
    RowFormat("bf16"),
    *(RowFormat(kind, group) for kind in ("q8", "q4") for group in GROUP_SIZES),
]
ACTIVATIONS = [Activation(kind, 0.25 if kind == "fatrelu" else 0.0) for kind in ACTIVATION_KINDS]
SHAPES = {"H1-I1": (1, 1), "H100-I333": (100, 333), "H257-I40": (257, 40), "H512-I65": (512, 65)}
formats = pytest.mark.parametrize("row_format", FORMATS, ids=str)
activations = pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.kind)
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def assert_close(found, expected, row_format):
    """expected: of the rounded reference, whose down projection is not rounded.

    A q4 row's factors become 8 bits of the largest of up to 16, which leaves about half a percent of the norm, and more
    where few differ much; q8's become 16 bits. For the rest see test_linear.py.
    """
    allowed = {"f32": 4e-6, "bf16": 4e-6, "q8": 1e-4, "q4": 0.02}[row_format.kind]
    assert found.isfinite().all()
    assert (found - expected).norm() <= allowed * expected.norm() + 1e-30


def rounded_factors_down(hidden, neurons, rows, num_shares):
    """The sum over neurons of hidden * row, with factors rounded as simd/int8_add.py says, share by share.

    hidden: [I]; neurons: those that are looked at, in order.
    """
    row_format, columns = rows.row_format, rows.columns
    group, num_groups = row_format.group, -(-columns // row_format.group)
    start = row_format.value_bytes(columns)
    scales = rows.rows[:, start : start + 2 * num_groups].contiguous().view(torch.float16).float()  # [I, groups]
    padded = torch.nn.functional.pad(dequantize_rows(rows.rows, columns, row_format), (0, num_groups * group - columns))
    levels = (padded.view(-1, num_groups, group) / torch.where(scales == 0, 1, scales)[..., None]).round()
    most_level = 127 if row_format.kind == "q4" else 32767
    total = torch.zeros(num_groups, group)
    for share in range(num_shares):
        part = neurons[len(neurons) * share // num_shares : len(neurons) * (share + 1) // num_shares]
        waiting = [neuron for neuron in part if hidden[neuron] != 0]
        for chunk in (waiting[idx : idx + MOST_ROWS] for idx in range(0, len(waiting), MOST_ROWS)):
            factors = hidden[chunk, None] * scales[chunk]  # [rows, groups]
            largest = factors.abs().amax(dim=0)
            whole = (factors * torch.where(largest == 0, 0, torch.tensor(float(most_level)) / largest)).round()
            total += torch.einsum("rg,rgc->gc", whole * (largest / most_level), levels[chunk])
    return total.view(-1)[:columns]


def some_neurons(num_neurons, share=0.3, slots=1):
    return torch.rand(slots, num_neurons) < share


@formats
@shapes
@activations
def test_a_token_is_the_rounded_reference(row_format, shape, activation, random_bundles, team):
    hidden_size, num_neurons = shape
    bundles, x = (
        random_bundles(num_neurons, hidden_size, row_format, gated=activation.is_gated),
        torch.randn(hidden_size),
    )
    for active in (None, some_neurons(num_neurons)):
        found, _ = decode_ffn(team, x, [bundles], activation, active=active)
        assert_close(found, reference.rounded_sparse_ffn(x[None], bundles, activation, active)[0], row_format)


@pytest.mark.parametrize("row_format", FORMATS[2:], ids=str)
@shapes
@activations
@pytest.mark.parametrize("num_shares", [1, 3])
def test_factors_are_rounded_as_documented(row_format, shape, activation, num_shares, random_bundles, team):
    """Equal but for a factor so near a half that it falls to the other side: a 127th of the largest of its 16."""
    hidden_size, num_neurons = shape
    bundles, x = (
        random_bundles(num_neurons, hidden_size, row_format, gated=activation.is_gated),
        torch.randn(hidden_size),
    )
    for active in (None, some_neurons(num_neurons)):
        among = range(num_neurons) if active is None else active[0].nonzero().squeeze(1).tolist()
        hidden = reference.rounded_hidden(x[None], bundles, activation, active)[0]
        expected = rounded_factors_down(hidden, list(among), bundles.down_proj_t, num_shares)
        found, _ = decode_ffn(team, x, [bundles], activation, active=active, num_shares=num_shares)
        difference = (found - expected).abs()
        assert (difference > 1e-5 * expected.abs().max()).sum() <= row_format.group * 2
        assert difference.norm() <= 4e-3 * expected.norm()


@formats
@pytest.mark.parametrize("kind", ["drelu", "relu"])
def test_biases_and_the_stream_are_added(row_format, kind, random_bundles, team):
    activation = Activation(kind)
    bundles, x = random_bundles(77, 100, row_format, gated=activation.is_gated, biases=True), torch.randn(100)
    residual = torch.randn(100)
    found, _ = decode_ffn(team, x, [bundles], activation, residual=residual)
    expected = reference.rounded_sparse_ffn(x[None], bundles, activation)[0] + residual
    assert_close(found, expected, row_format)


@formats
def test_experts_are_added_with_their_weights(row_format, random_bundles, team):
    activation = Activation("drelu")
    networks = [random_bundles(77, 100, row_format, gated=True, biases=idx != 1, seed=idx) for idx in range(4)]
    x, chosen, weights = torch.randn(100), [0, 1, 3], [0.5, 0.3, 0.2]
    active = some_neurons(77, slots=3)
    for selected in (None, active):
        found, _ = decode_ffn(team, x, networks, activation, chosen=chosen, weights=weights, active=selected)
        expected = sum(
            weight
            * reference.rounded_sparse_ffn(
                x[None], networks[idx], activation, None if selected is None else active[slot : slot + 1]
            )[0]
            for slot, (idx, weight) in enumerate(zip(chosen, weights, strict=True))
        )
        assert_close(found, expected, row_format)


@formats
@activations
def test_rows_are_counted_as_they_are_needed(row_format, activation, random_bundles, team):
    """A gate that does not fire spares up and down, a zero spares down."""
    bundles, x = random_bundles(200, 100, row_format, gated=activation.is_gated), torch.randn(100)
    gate = rounded_linear(x[None], bundles.gate_proj)[0] if bundles.has_gate else None
    up = rounded_linear(x[None], bundles.up_proj)[0]
    fires = gate > activation.threshold if activation.gate_decides else torch.ones(200, dtype=torch.bool)
    hidden = activate(activation, gate, up)
    undecided = up.abs() < 1e-5
    if gate is not None:
        undecided |= (gate - activation.threshold).abs() < 1e-5
    for active in (None, some_neurons(200)):
        among = torch.ones(200, dtype=torch.bool) if active is None else active[0]
        expected = [int(among.sum()) if bundles.has_gate else 0, int((among & fires).sum())]
        expected.append(int((among & fires & (hidden != 0)).sum()))
        found = decode_ffn(team, x, [bundles], activation, active=active)[1]
        assert found[0] == expected[0]
        assert all(abs(a - b) <= undecided.sum() for a, b in zip(found, expected, strict=True)), (found, expected)
    assert undecided.sum() <= 2


@formats
@pytest.mark.parametrize("num_shares", [1, 2, 32, 100])
def test_any_number_of_shares_adds_up(row_format, num_shares, random_bundles, team):
    """Also more than there are neurons."""
    bundles, x, activation = random_bundles(77, 100, row_format, gated=True), torch.randn(100), Activation("drelu")
    for active in (None, some_neurons(77)):
        found, _ = decode_ffn(team, x, [bundles], activation, active=active, num_shares=num_shares)
        assert_close(found, reference.rounded_sparse_ffn(x[None], bundles, activation, active)[0], row_format)


@formats
def test_a_token_does_not_depend_on_the_number_of_threads(row_format, random_bundles, team, lone_team):
    bundles, x, active = random_bundles(333, 200, row_format, gated=True), torch.randn(200), some_neurons(333)
    found = [decode_ffn(each, x, [bundles], Activation("drelu"), active=active)[0] for each in (team, lone_team)]
    assert torch.equal(*found)


@formats
def test_no_active_neuron_gives_the_stream_and_the_bias(row_format, random_bundles, team):
    bundles, residual = random_bundles(77, 100, row_format, gated=True, biases=True), torch.randn(100)
    nobody = torch.zeros(1, 77, dtype=torch.bool)
    found, rows = decode_ffn(team, torch.randn(100), [bundles], Activation("drelu"), active=nobody, residual=residual)
    assert torch.equal(found, residual + bundles.down_bias)
    assert rows == [0, 0, 0]


@formats
def test_bundles_that_are_not_active_are_not_read(row_format, random_bundles, team):
    bundles, x, active = random_bundles(77, 100, row_format, gated=True), torch.randn(100), some_neurons(77)
    before, _ = decode_ffn(team, x, [bundles], Activation("drelu"), active=active)
    bundles.data[~active[0]] = 255
    assert torch.equal(decode_ffn(team, x, [bundles], Activation("drelu"), active=active)[0], before)


@formats
def test_rows_behind_a_silent_gate_are_not_read(row_format, random_bundles, team):
    bundles, x = random_bundles(77, 100, row_format, gated=True), torch.randn(100)
    before, _ = decode_ffn(team, x, [bundles], Activation("relu_glu"))
    silent = rounded_linear(x[None], bundles.gate_proj)[0] <= 0
    bundles.data[silent, 1:] = 255
    assert silent.any()
    assert torch.equal(decode_ffn(team, x, [bundles], Activation("relu_glu"))[0], before)


@formats
def test_bundles_may_lie_apart(row_format, random_bundles, team):
    bundles, x = random_bundles(33, 70, row_format, gated=True), torch.randn(70)
    apart = torch.full((33, 4, bundles.data.shape[2] + 64), 255, dtype=torch.uint8)
    apart[:, 1:, 64:] = bundles.data
    strided = Bundles(apart[:, 1:, 64:], 70, row_format)
    found, expected = (decode_ffn(team, x, [each], Activation("drelu"))[0] for each in (strided, bundles))
    assert torch.equal(found, expected)


@formats
@pytest.mark.parametrize("kind", ["silu_glu", "gelu_glu", "gelu_tanh_glu"])
def test_large_gates_do_not_overflow(row_format, kind, random_bundles, team):
    bundles, x = random_bundles(40, 64, row_format, gated=True), torch.randn(64) * 1e4
    found, _ = decode_ffn(team, x, [bundles], Activation(kind))
    assert_close(found, reference.rounded_sparse_ffn(x[None], bundles, Activation(kind))[0], row_format)


@formats
def test_extreme_values_do_not_overflow(row_format, random_bundles, team):
    """16 rows at their largest times factors at their largest: what sums in 16 bits must hold, row by row and lane."""
    bundles = random_bundles(320, 256, row_format, gated=False)
    signs = torch.where(torch.rand(2 * 320, 256) < 0.5, -1.0, 1.0)
    signs[: 2 * 64] = 1
    signs[2 * 64 : 2 * 128] = -1
    bundles.data[:] = quantize_rows(signs, row_format).view_as(bundles.data)
    for x in (torch.ones(256), signs[-1], -torch.ones(256)):
        found, _ = decode_ffn(team, x, [bundles], Activation("silu"))
        assert_close(found, reference.rounded_sparse_ffn(x[None], bundles, Activation("silu"))[0], row_format)
