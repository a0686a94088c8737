"""Sparse feed-forward: the references against a neuron-by-neuron float64 formula, the batch against the references."""

import pytest
import torch
from torch.nn import functional

from hybrid_kernels.activation import ACTIVATION_KINDS, Activation
from hybrid_kernels.linear import batch as linear_batch
from hybrid_kernels.packed_matrix import Bundles
from hybrid_kernels.quantization.row_format import GROUP_SIZES, RowFormat
from hybrid_kernels.sparse_ffn import batch, reference
from hybrid_kernels.sparse_ffn.op import sparse_ffn

F32 = RowFormat("f32")
QUANTIZED = [RowFormat(kind, group) for kind in ("q8", "q4") for group in GROUP_SIZES]
FORMATS = [F32, RowFormat("bf16"), *QUANTIZED]
ACTIVATIONS = [Activation(kind, 0.25 if kind == "fatrelu" else 0.0) for kind in ACTIVATION_KINDS]
SHAPES = {
    "T1-H1-I1": (1, 1, 1),
    "T3-H100-I333": (3, 100, 333),
    "T1-H257-I40": (1, 257, 40),
    "T0-H64-I8": (0, 64, 8),
    "T33-H70-I600": (33, 70, 600),
}
SHARES = {"none": 0.0, "one": None, "half": 0.5, "most": 0.95, "all": 1.0}

formats = pytest.mark.parametrize("row_format", FORMATS, ids=str)
quantized = pytest.mark.parametrize("row_format", QUANTIZED, ids=str)
activations = pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.kind)
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
shares = pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)


def active_set(num_tokens, num_neurons, share) -> torch.Tensor:
    if share is not None:
        return torch.rand(num_tokens, num_neurons) < share
    active = torch.zeros(num_tokens, num_neurons, dtype=torch.bool)
    active[:, num_neurons // 2] = True
    return active


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums of H <= 257, I <= 333 float32 terms in two orders: about sqrt(H + I) * 6e-8 of the largest sum, times 4."""
    assert found.dtype == torch.float32
    size = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=6e-6 * size)


def one_neuron(kind, threshold, gate, up):
    smooth = {
        "silu_glu": functional.silu,
        "gelu_glu": functional.gelu,
        "gelu_tanh_glu": lambda value: functional.gelu(value, approximate="tanh"),
        "gelu": functional.gelu,
        "silu": functional.silu,
    }
    if kind in smooth:
        return smooth[kind](up) if gate is None else smooth[kind](gate) * up
    if gate is None:
        return up.clamp(min=0) ** (2 if kind == "relu2" else 1)
    fires = gate * (gate > threshold)
    return fires**2 * up if kind == "relu2_glu" else fires * (up.clamp(min=0) if kind == "drelu" else up)


def neuron_by_neuron(x, bundles, activation, active, decode_rows) -> torch.Tensor:
    rows = [
        torch.from_numpy(decode_rows(bundles.data[:, part], bundles.hidden_size, bundles.row_format))
        for part in range(bundles.data.shape[1])
    ]
    x = x.double()
    output = torch.zeros_like(x)
    for neuron in range(bundles.num_neurons):
        up = x @ rows[-2][neuron] + (0 if bundles.up_bias is None else bundles.up_bias[neuron])
        gate = None
        if bundles.has_gate:
            gate = x @ rows[0][neuron] + (0 if bundles.gate_bias is None else bundles.gate_bias[neuron])
        hidden = one_neuron(activation.kind, activation.threshold, gate, up)
        if active is not None:
            hidden = torch.where(active[:, neuron], hidden, 0)
        output += hidden[:, None] * rows[-1][neuron]
    return output if bundles.down_bias is None else output + bundles.down_bias


@formats
@activations
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_reference_is_the_formula(row_format, activation, biases, random_bundles, decode_rows):
    bundles = random_bundles(33, 70, row_format, gated=activation.is_gated, biases=biases)
    x, active = torch.randn(3, 70), active_set(3, 33, 0.5)
    for chosen in (None, active):
        expected = neuron_by_neuron(x, bundles, activation, chosen, decode_rows)
        assert_close(reference.sparse_ffn(x, bundles, activation, chosen), expected)


def rounded(x, bundles, activation, active=None) -> torch.Tensor:
    """What the batch computes, with its roundings: neurons that no token needs are left out before they are grouped."""
    hidden, rows = reference.rounded_hidden(x, bundles, activation, active), bundles.down_proj_t
    if not bundles.row_format.is_quantized:
        return reference.rounded_sparse_ffn(x, bundles, activation, active)
    if active is not None and active.any(dim=0).sum() < batch.WORTHWHILE_SHARE * bundles.num_neurons:
        neurons = active.any(dim=0).nonzero().squeeze(1)
        hidden, rows = hidden[:, neurons], bundles.take(neurons).down_proj_t
    output = reference.rounded_down(hidden, rows) if rows.num_rows else torch.zeros_like(x)
    return output if bundles.down_bias is None else output + bundles.down_bias


def assert_same_roundings(found, expected):
    """As assert_close, but for values so near a half that they are rounded to the other side.

    Such a value moves by a 127th of its group's largest, of which at least one is there: below a third of it in sum.
    Most tokens have none of them.
    """
    assert found.isfinite().all()
    sizes, differences = expected.norm(dim=1), (found - expected).norm(dim=1)
    assert (differences <= 4e-3 * sizes + 1e-7).all()
    assert len(found) < 4 or differences.median() <= 5e-4 * sizes.median()


@formats
@activations
def test_reference_rounds_only_for_rows_with_scales(row_format, activation, random_bundles):
    bundles = random_bundles(33, 70, row_format, gated=activation.is_gated, biases=True)
    x = torch.randn(3, 70)
    exact, found = (twin(x, bundles, activation) for twin in (reference.sparse_ffn, reference.rounded_sparse_ffn))
    assert torch.equal(exact, found) == (not row_format.is_quantized)
    assert (exact - found).norm() < 0.02 * exact.norm()  # 1/127 of the largest of 32 to 128 values, through two factors


def test_rounded_down_is_within_a_127th(random_bundles):
    rows, hidden = random_bundles(100, 70, F32, gated=True).down_proj_t, torch.randn(3, 100).relu()
    exact = hidden @ rows.rows[:, : 4 * 70].contiguous().view(torch.float32)
    assert 1e-4 * exact.norm() < (reference.rounded_down(hidden, rows) - exact).norm() < 0.015 * exact.norm()


@activations
@shapes
@shares
def test_a_batch_in_f32_is_the_reference(activation, shape, share, random_bundles, team):
    num_tokens, hidden_size, num_neurons = shape
    bundles = random_bundles(num_neurons, hidden_size, F32, gated=activation.is_gated, biases=True)
    x, active = torch.randn(num_tokens, hidden_size), active_set(num_tokens, num_neurons, share)
    for chosen in (None, active):
        found = sparse_ffn(x, bundles, activation, chosen, team=team)
        assert_close(found, reference.sparse_ffn(x, bundles, activation, chosen))


@formats
@shapes
@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_a_batch_is_the_rounded_reference(row_format, shape, gated, biases, random_bundles, team):
    num_tokens, hidden_size, num_neurons = shape
    activation = Activation("drelu" if gated else "relu")
    bundles = random_bundles(num_neurons, hidden_size, row_format, gated=gated, biases=biases)
    x = torch.randn(num_tokens, hidden_size)
    for share in SHARES.values():
        active = active_set(num_tokens, num_neurons, share)
        for chosen in (None, active):
            found = sparse_ffn(x, bundles, activation, chosen, team=team)
            assert_same_roundings(found, rounded(x, bundles, activation, chosen))


@quantized
@activations
def test_rounding_costs_little(row_format, activation, random_bundles, team):
    """Three roundings to a 127th of the largest of 32 or more values, each about half a percent of a norm."""
    bundles = random_bundles(600, 512, row_format, gated=activation.is_gated)
    x = torch.randn(5, 512)
    exact = reference.sparse_ffn(x, bundles, activation)
    assert (sparse_ffn(x, bundles, activation, team=team) - exact).norm() < 0.025 * exact.norm()
    rounded_x = reference.rounded_sparse_ffn(x, bundles, activation)
    assert (sparse_ffn(x, bundles, activation, team=team) - rounded_x).norm() < 0.015 * rounded_x.norm()


@formats
def test_an_ffn_does_not_depend_on_the_number_of_threads(row_format, random_bundles, team, lone_team):
    bundles, x, active = random_bundles(333, 200, row_format, gated=True), torch.randn(5, 200), active_set(5, 333, 0.1)
    for chosen in (None, active):
        found = [sparse_ffn(x, bundles, Activation("drelu"), chosen, team=each) for each in (team, lone_team)]
        assert torch.equal(*found)


def test_blocks_of_neurons_add_up(monkeypatch, random_bundles, team):
    monkeypatch.setattr(batch, "BLOCK_WEIGHTS", 2000)
    monkeypatch.setattr(linear_batch, "UNPACK_WEIGHTS", 500)
    bundles, x, active = (
        random_bundles(77, 100, RowFormat("bf16"), gated=True),
        torch.randn(2, 100),
        active_set(2, 77, 0.1),
    )
    for chosen in (None, active):
        found = sparse_ffn(x, bundles, Activation("drelu"), chosen, team=team)
        assert_close(found, reference.sparse_ffn(x, bundles, Activation("drelu"), chosen))


@formats
@pytest.mark.parametrize("kind", ["silu_glu", "gelu_glu", "gelu_tanh_glu"])
def test_large_gates_do_not_overflow(row_format, kind, random_bundles, team):
    """exp(-gate) of float32 is infinite from gate = -89 on."""
    bundles, x = random_bundles(40, 64, row_format, gated=True), torch.randn(2, 64) * 1e4
    found = sparse_ffn(x, bundles, Activation(kind), team=team)
    assert found.isfinite().all()
    assert_same_roundings(found, rounded(x, bundles, Activation(kind)))


@formats
def test_an_ffn_of_no_neurons_gives_zeros(row_format, random_bundles, team):
    """A tier may hold none of an FFN."""
    bundles = random_bundles(3, 100, row_format, gated=True).take(slice(0, 0))
    for active in (None, torch.zeros(2, 0, dtype=torch.bool)):
        found = sparse_ffn(torch.randn(2, 100), bundles, Activation("drelu"), active, team=team)
        assert torch.equal(found, torch.zeros(2, 100))


def small_integers(*shape) -> torch.Tensor:
    return torch.randint(-4, 5, shape).float()


@pytest.mark.parametrize("activation", [each for each in ACTIVATIONS if each.is_sparse], ids=lambda each: each.kind)
@shares
def test_where_sums_are_exact_every_way_gives_the_same_bits(activation, share, team):
    """Small whole numbers add up exactly in float32, so neither blocks nor gathering may change a bit."""
    weights = small_integers(53, 3 if activation.is_gated else 2, 10)
    data = torch.zeros(*weights.shape[:2], 64, dtype=torch.uint8)
    data[..., :40] = weights.view(torch.uint8)
    bundles = Bundles(data, 10, F32, up_bias=small_integers(53), down_bias=small_integers(10))
    x, active = small_integers(3, 10), active_set(3, 53, share)
    expected = reference.sparse_ffn(x, bundles, activation, active)
    assert torch.equal(sparse_ffn(x, bundles, activation, active, team=team), expected)
    assert share in (0.0, None) or expected.unique().numel() > 10


@formats
def test_bundles_that_no_token_activates_are_not_read(row_format, random_bundles, team):
    """Their bytes may lie on another tier: NaN in them must not reach the output."""
    bundles = random_bundles(20, 64, row_format, gated=True)
    active = torch.zeros(2, 20, dtype=torch.bool)
    active[0, 3] = active[1, 17] = True
    x = torch.randn(2, 64)
    expected = rounded(x, bundles, Activation("drelu"), active)
    bundles.data[~active.any(dim=0)] = 255
    assert_same_roundings(sparse_ffn(x, bundles, Activation("drelu"), active, team=team), expected)


@formats
def test_without_an_active_neuron_the_output_is_the_bias(row_format, random_bundles, team):
    bundles = random_bundles(20, 64, row_format, gated=True, biases=True)
    nobody = torch.zeros(3, 20, dtype=torch.bool)
    output = sparse_ffn(torch.randn(3, 64), bundles, Activation("drelu"), nobody, team=team)
    assert torch.equal(output, bundles.down_bias.expand(3, 64))


def test_tokens_have_their_own_active_sets(random_bundles, team):
    bundles, x = random_bundles(20, 64, F32, gated=True), torch.randn(2, 64)
    active = active_set(2, 20, 0.5)
    together = sparse_ffn(x, bundles, Activation("relu_glu"), active, team=team)
    for token in range(2):
        rows = slice(token, token + 1)
        assert_close(together[rows], sparse_ffn(x[rows], bundles, Activation("relu_glu"), active[rows], team=team))


@formats
def test_bundles_may_lie_apart(row_format, random_bundles, team):
    """A tier's slots are wider than its bundles where another model's were there before."""
    bundles, x = random_bundles(33, 70, row_format, gated=True), torch.randn(3, 70)
    apart = torch.full((33, 4, bundles.data.shape[2] + 64), 255, dtype=torch.uint8)
    apart[:, 1:, 64:] = bundles.data
    strided = Bundles(apart[:, 1:, 64:], 70, row_format)
    for active in (None, active_set(3, 33, 0.2)):
        found, expected = (sparse_ffn(x, each, Activation("drelu"), active, team=team) for each in (strided, bundles))
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "x", [torch.ones(2, 63), torch.ones(64), torch.ones(2, 64, dtype=torch.bfloat16)], ids=["narrow", "1-D", "bf16"]
)
def test_an_x_that_does_not_fit_is_refused(x, random_bundles, team):
    with pytest.raises(ValueError, match=r"x is torch\..*, expected float32 \[T, 64\]"):
        sparse_ffn(x, random_bundles(5, 64, F32, gated=True), Activation("drelu"), team=team)


@pytest.mark.parametrize(
    ("kind", "gated", "message"),
    [("drelu", False, "drelu on bundles without"), ("relu", True, "relu on bundles with a")],
)
def test_bundles_of_another_kind_of_ffn_are_refused(kind, gated, message, random_bundles, team):
    with pytest.raises(ValueError, match=message):
        sparse_ffn(torch.ones(1, 64), random_bundles(5, 64, F32, gated=gated), Activation(kind), team=team)


@pytest.mark.parametrize(
    "active",
    [
        torch.ones(5, dtype=torch.bool),
        torch.ones(2, 5, dtype=torch.bool),
        torch.ones(1, 4, dtype=torch.bool),
        torch.ones(1, 5),
    ],
    ids=["1-D", "two tokens", "four neurons", "float"],
)
def test_an_active_set_that_does_not_fit_is_refused(active, random_bundles, team):
    with pytest.raises(ValueError, match=r"active is torch\..*, expected bool \(1, 5\)"):
        sparse_ffn(torch.ones(1, 64), random_bundles(5, 64, F32, gated=True), Activation("drelu"), active, team=team)
