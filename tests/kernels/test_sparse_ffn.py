"""Sparse feed-forward: the reference against a neuron-by-neuron float64 formula, the twin against the reference."""

import numba
import pytest
import torch
from torch.nn import functional

from hybrid_kernels.activation import ACTIVATION_KINDS, Activation
from hybrid_kernels.linear import cpu as linear_cpu
from hybrid_kernels.packed_matrix import Bundles
from hybrid_kernels.quantization.row_format import GROUP_SIZES, RowFormat
from hybrid_kernels.sparse_ffn import cpu, op, reference
from hybrid_kernels.sparse_ffn.op import sparse_ffn

F32 = RowFormat("f32")
FORMATS = [F32, RowFormat("bf16"), *(RowFormat(kind, group) for kind in ("q8", "q4") for group in GROUP_SIZES)]
ACTIVATIONS = [Activation(kind, 0.25 if kind == "fatrelu" else 0.0) for kind in ACTIVATION_KINDS]
DECIDING = [activation for activation in ACTIVATIONS if activation.gate_decides]
SHAPES = {"T1-H1-I1": (1, 1, 1), "T3-H100-I333": (3, 100, 333), "T1-H257-I40": (1, 257, 40), "T0-H64-I8": (0, 64, 8)}
SHARES = {"none": 0.0, "one": None, "half": 0.5, "most": 0.9, "all": 1.0}

# One a way through the twin; the blocks are of a few neurons.
PATHS = {
    "torch": {"SMALLEST_COMPILED": 1 << 30, "BLOCK_WEIGHTS": 2000},
    "tokens": {"SMALLEST_COMPILED": 0, "MOST_TOKENS": 99},
    "blocks": {"SMALLEST_COMPILED": 0, "MOST_TOKENS": -1, "BLOCK_WEIGHTS": 2000},
}

formats = pytest.mark.parametrize("row_format", FORMATS, ids=str)
activations = pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.kind)
deciding = pytest.mark.parametrize("activation", DECIDING, ids=lambda activation: activation.kind)
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
paths = pytest.mark.parametrize("path", PATHS)
shares = pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)


@pytest.fixture
def take_path(monkeypatch):
    def take(path: str) -> None:
        for name, value in PATHS[path].items():
            monkeypatch.setattr(cpu, name, value)
        monkeypatch.setattr(linear_cpu, "SMALLEST_COMPILED", PATHS[path]["SMALLEST_COMPILED"])
        monkeypatch.setattr(op, "SMALLEST_COMPILED", 0)  # every path is the twin's

    return take


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


@activations
@shapes
@paths
def test_cpu_is_the_reference(take_path, path, activation, shape, random_bundles):
    take_path(path)
    num_tokens, hidden_size, num_neurons = shape
    bundles = random_bundles(num_neurons, hidden_size, F32, gated=activation.is_gated, biases=True)
    x = torch.randn(num_tokens, hidden_size)
    for share in SHARES.values():
        active = active_set(num_tokens, num_neurons, share)
        found = cpu.sparse_ffn(x, bundles, activation, active)
        assert_close(found, reference.sparse_ffn(x, bundles, activation, active))


@formats
@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
@paths
def test_cpu_is_the_reference_in_every_format(take_path, path, row_format, gated, biases, random_bundles):
    take_path(path)
    activation = Activation("drelu" if gated else "relu")
    bundles = random_bundles(77, 100, row_format, gated=gated, biases=biases)
    x = torch.randn(2, 100)
    for active in (None, active_set(2, 77, 0.1), active_set(2, 77, 0.9)):
        found = cpu.sparse_ffn(x, bundles, activation, active)
        assert_close(found, reference.sparse_ffn(x, bundles, activation, active))


@deciding
@formats
@paths
def test_gate_first_is_the_full_computation(take_path, path, activation, row_format, random_bundles):
    take_path(path)
    bundles, x = random_bundles(77, 100, row_format, gated=True, biases=True), torch.randn(2, 100)
    for active in (None, active_set(2, 77, None), active_set(2, 77, 0.5)):
        found = sparse_ffn(x, bundles, activation, active, gate_first=True)
        assert_close(found, reference.sparse_ffn(x, bundles, activation, active))


@formats
@paths
def test_an_ffn_does_not_depend_on_the_number_of_threads(take_path, path, row_format, random_bundles):
    take_path(path)
    bundles, x, active = random_bundles(77, 100, row_format, gated=True), torch.randn(2, 100), active_set(2, 77, 0.5)
    one = cpu.sparse_ffn(x, bundles, Activation("drelu"), active)
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    assert torch.equal(cpu.sparse_ffn(x, bundles, Activation("drelu"), active), one)


@paths
@pytest.mark.parametrize("kind", ["silu_glu", "gelu_glu", "gelu_tanh_glu"])
def test_large_gates_do_not_overflow(take_path, path, kind, random_bundles):
    """exp(-gate) of float32 is infinite from gate = -89 on."""
    take_path(path)
    bundles, x = random_bundles(40, 64, F32, gated=True), torch.randn(1, 64) * 1e4
    found = cpu.sparse_ffn(x, bundles, Activation(kind))
    assert found.isfinite().all()
    assert_close(found, reference.sparse_ffn(x, bundles, Activation(kind)))


@formats
@paths
def test_an_ffn_of_no_neurons_gives_zeros(take_path, path, row_format, random_bundles):
    """A tier may hold none of an FFN."""
    take_path(path)
    bundles = random_bundles(3, 100, row_format, gated=True).take(slice(0, 0))
    for active in (None, torch.zeros(2, 0, dtype=torch.bool)):
        assert torch.equal(
            cpu.sparse_ffn(torch.randn(2, 100), bundles, Activation("drelu"), active), torch.zeros(2, 100)
        )


def small_integers(*shape) -> torch.Tensor:
    return torch.randint(-4, 5, shape).float()


@pytest.mark.parametrize("activation", [each for each in ACTIVATIONS if each.is_sparse], ids=lambda each: each.kind)
@shares
@paths
def test_where_sums_are_exact_every_way_gives_the_same_bits(take_path, path, activation, share):
    """Small whole numbers add up exactly in float32, so neither blocks nor gathering may change a bit."""
    take_path(path)
    weights = small_integers(53, 3 if activation.is_gated else 2, 10)
    data = torch.zeros(*weights.shape[:2], 64, dtype=torch.uint8)
    data[..., :40] = weights.view(torch.uint8)
    bundles = Bundles(data, 10, F32, up_bias=small_integers(53), down_bias=small_integers(10))
    x, active = small_integers(3, 10), active_set(3, 53, share)
    expected = reference.sparse_ffn(x, bundles, activation, active)
    for gate_first in (False, True) if activation.gate_decides else (False,):
        assert torch.equal(sparse_ffn(x, bundles, activation, active, gate_first=gate_first), expected)
    assert share in (0.0, None) or expected.unique().numel() > 10


@paths
@pytest.mark.parametrize("gate_first", [True, False], ids=["gate first", "predicted"])
def test_bundles_that_no_token_activates_are_not_read(take_path, path, random_bundles, gate_first):
    """Their bytes may lie on another tier: NaN in them must not reach the output."""
    take_path(path)
    bundles = random_bundles(20, 64, F32, gated=True)
    active = torch.zeros(2, 20, dtype=torch.bool)
    active[0, 3] = active[1, 17] = True
    x = torch.randn(2, 64)
    expected = reference.sparse_ffn(x, bundles, Activation("drelu"), active)
    idle = ~active.any(dim=0)
    if gate_first:
        bundles.data[idle, 1:] = 255  # gate rows are read, the other two are not
    else:
        bundles.data[idle] = 255
    assert bundles.up_proj.rows[0].view(torch.float32).isnan().all()
    assert_close(sparse_ffn(x, bundles, Activation("drelu"), active, gate_first=gate_first), expected)


@paths
def test_without_an_active_neuron_the_output_is_the_bias(take_path, path, random_bundles):
    take_path(path)
    bundles = random_bundles(20, 64, F32, gated=True, biases=True)
    output = sparse_ffn(torch.randn(3, 64), bundles, Activation("drelu"), torch.zeros(3, 20, dtype=torch.bool))
    assert torch.equal(output, bundles.down_bias.expand(3, 64))


@paths
def test_tokens_have_their_own_active_sets(take_path, path, random_bundles):
    take_path(path)
    bundles, x = random_bundles(20, 64, F32, gated=True), torch.randn(2, 64)
    active = active_set(2, 20, 0.5)
    together = sparse_ffn(x, bundles, Activation("relu_glu"), active)
    for token in range(2):
        rows = slice(token, token + 1)
        assert_close(together[rows], sparse_ffn(x[rows], bundles, Activation("relu_glu"), active[rows]))


@pytest.mark.parametrize(
    "x", [torch.ones(2, 63), torch.ones(64), torch.ones(2, 64, dtype=torch.bfloat16)], ids=["narrow", "1-D", "bf16"]
)
def test_an_x_that_does_not_fit_is_refused(x, random_bundles):
    with pytest.raises(ValueError, match=r"x is torch\..*, expected float32 \[T, 64\]"):
        sparse_ffn(x, random_bundles(5, 64, F32, gated=True), Activation("drelu"))


@pytest.mark.parametrize(
    ("kind", "gated", "message"),
    [("drelu", False, "drelu on bundles without"), ("relu", True, "relu on bundles with a")],
)
def test_bundles_of_another_kind_of_ffn_are_refused(kind, gated, message, random_bundles):
    with pytest.raises(ValueError, match=message):
        sparse_ffn(torch.ones(1, 64), random_bundles(5, 64, F32, gated=gated), Activation(kind))


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
def test_an_active_set_that_does_not_fit_is_refused(active, random_bundles):
    with pytest.raises(ValueError, match=r"active is torch\..*, expected bool \(1, 5\)"):
        sparse_ffn(torch.ones(1, 64), random_bundles(5, 64, F32, gated=True), Activation("drelu"), active)


@pytest.mark.parametrize("kind", ["silu_glu", "gelu_glu", "gelu_tanh_glu", "relu", "relu2", "gelu", "silu"])
def test_gate_first_without_a_gate_that_decides_is_refused(kind, random_bundles):
    bundles = random_bundles(5, 64, F32, gated=Activation(kind).is_gated)
    with pytest.raises(ValueError, match=f"gate_first needs an activation whose gate decides, found {kind}"):
        sparse_ffn(torch.ones(1, 64), bundles, Activation(kind), gate_first=True)
