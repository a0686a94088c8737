"""Predictors without training, against the gate itself in plain torch."""

import pytest
import torch

from hybrid_kernels.activation import Activation, activate
from hybrid_kernels.packed_matrix import Bundles
from hybrid_kernels.quantization.op import quantize_rows
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_predictors.sketch import exact_gate, sign_sketch, svd_sketch
from hybrid_predictors.study import OraclePredictor, RandomPredictor

F32, Q4, Q8 = RowFormat("f32"), RowFormat("q4", 32), RowFormat("q8", 32)
HIDDEN, NEURONS, TOKENS = 48, 70, 60


def network(parts=3, gate_bias=None, up_bias=None) -> tuple[Bundles, torch.Tensor]:
    weights = torch.randn(NEURONS, parts, HIDDEN, generator=torch.Generator().manual_seed(0)) / HIDDEN**0.5
    rows = quantize_rows(weights.view(-1, HIDDEN), F32).view(NEURONS, parts, -1)
    return Bundles(rows, HIDDEN, F32, gate_bias=gate_bias, up_bias=up_bias), weights


@pytest.fixture
def inputs() -> torch.Tensor:
    """Correlated, as a stream's are: a few directions have most of the variance."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(TOKENS, HIDDEN, generator=generator) * torch.linspace(3, 0.05, HIDDEN)


def test_exact_gate_names_what_the_gate_lets_through(inputs, team):
    bias = torch.linspace(-1, 1, NEURONS)
    bundles, weights = network(gate_bias=bias)
    for threshold in (0.0, 0.25):
        named = exact_gate(bundles, threshold).active(inputs, team)
        gates = (inputs.double() @ weights[:, 0].double().T + bias.double()) - threshold
        certain = gates.abs() > 1e-5
        assert torch.equal(named[certain], gates[certain] > 0)


def test_without_a_gate_the_up_rows_decide(inputs, team):
    bundles, weights = network(parts=2, up_bias=torch.zeros(NEURONS))
    logits = exact_gate(bundles).logits(inputs, team)
    torch.testing.assert_close(logits, inputs @ weights[:, 0].T, atol=1e-5, rtol=1e-5)


def test_sign_sketch_agrees_with_the_gate_where_it_is_not_near_zero(inputs, team):
    bundles, weights = network()
    sketch = sign_sketch(bundles, Q4)
    gates = inputs @ weights[:, 0].T
    named = sketch.active(inputs, team)
    clear = gates.abs() > 0.5 * gates.std()
    assert (named == (gates > 0))[clear].float().mean() > 0.98
    assert sketch.num_bytes == NEURONS * Q4.row_bytes(HIDDEN)


def test_svd_of_full_rank_is_the_gate(inputs, team):
    bundles, weights = network()
    logits = svd_sketch(bundles, inputs, HIDDEN, F32).logits(inputs, team)
    torch.testing.assert_close(logits, inputs @ weights[:, 0].T, atol=1e-3, rtol=1e-3)


def test_svd_keeps_what_the_inputs_weigh(team, inputs):
    """With inputs of few directions, a low rank loses little; the plain SVD of the weights would lose much."""
    bundles, weights = network()
    gates = inputs @ weights[:, 0].T
    errors = {}
    for rank in (4, 12, 24):
        logits = svd_sketch(bundles, inputs, rank, F32).logits(inputs, team)
        errors[rank] = float((logits - gates).norm() / gates.norm())
    left, values, right = torch.linalg.svd(weights[:, 0])
    plain = inputs @ (left[:, :12] * values[:12] @ right[:12]).T
    assert errors[4] > errors[12] > errors[24]
    assert errors[12] < 0.8 * float((plain - gates).norm() / gates.norm())


def test_svd_is_as_good_as_the_whole_decomposition(team, inputs):
    """The best approximation of the gates on these inputs there is, of a rank: Eckart and Young."""
    bundles, weights = network()
    gates = inputs @ weights[:, 0].T
    for rank in (3, 10):
        sketch = svd_sketch(bundles, inputs, rank, F32)
        found = float((sketch.logits(inputs, team) - gates).norm())
        least = float(torch.linalg.svdvals(gates)[rank:].norm())
        assert least <= found * 1.0001
        assert found <= 1.02 * least
        assert torch.equal(sketch.fc1.rows, svd_sketch(bundles, inputs, rank, F32).fc1.rows)


@pytest.mark.parametrize("rank", [0, HIDDEN + 1])
def test_ranks_that_a_matrix_has_not_are_refused(rank, inputs):
    with pytest.raises(ValueError, match=rf"rank {rank}: .* ranks from 1 to {HIDDEN}"):
        svd_sketch(network()[0], inputs, rank, Q8)


@pytest.mark.parametrize("kind", ["drelu", "relu_glu"])
def test_oracle_names_exactly_what_fires(kind, inputs, team):
    bundles, weights = network()
    activation = Activation(kind)
    named = OraclePredictor(bundles, activation).active(inputs, team)
    values = activate(activation, inputs @ weights[:, 0].T, inputs @ weights[:, 1].T)
    assert torch.equal(named, values != 0)


def test_random_names_a_share_whatever_the_input(inputs, team):
    predictor = RandomPredictor(1000, seed=3, threshold=0.9)
    named = predictor.active(inputs, team)
    assert named.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(named, predictor.active(-inputs, team))
    assert predictor.num_bytes == 0
