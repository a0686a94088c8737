"""Activations: each kind's formula, which of them leave zeros, and what is refused."""

import math

import numpy as np
import pytest
import torch

from hybrid_kernels.activation import ACTIVATION_KINDS, Activation, activate, gate_fires

erf = np.vectorize(math.erf)


def silu(v):
    return v / (1 + np.exp(-v))


def gelu(v):
    return v * 0.5 * (1 + erf(v / math.sqrt(2)))


def gelu_tanh(v):
    return 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


def relu(v):
    return np.where(v > 0, v, 0)


FORMULAS = {
    "silu_glu": lambda gate, up: silu(gate) * up,
    "gelu_glu": lambda gate, up: gelu(gate) * up,
    "gelu_tanh_glu": lambda gate, up: gelu_tanh(gate) * up,
    "relu_glu": lambda gate, up: relu(gate) * up,
    "drelu": lambda gate, up: relu(gate) * relu(up),
    "fatrelu": lambda gate, up: np.where(gate > 0.25, gate, 0) * up,
    "relu2_glu": lambda gate, up: relu(gate) ** 2 * up,
    "relu": lambda _, up: relu(up),
    "relu2": lambda _, up: relu(up) ** 2,
    "gelu": lambda _, up: gelu(up),
    "silu": lambda _, up: silu(up),
}
UNGATED = {"relu", "relu2", "gelu", "silu"}
GATE_DECIDES = {"relu_glu", "drelu", "fatrelu", "relu2_glu"}
SPARSE = GATE_DECIDES | {"relu", "relu2"}


def of_kind(kind: str) -> Activation:
    return Activation(kind, 0.25 if kind == "fatrelu" else 0.0)


def test_every_kind_has_a_formula_here():
    assert set(FORMULAS) == set(ACTIVATION_KINDS)


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 333)], ids=["I0", "I1", "T3-I333"])
def test_activate_is_the_formula(kind, shape):
    gate, up = torch.randn(2, *shape) * 2
    found = activate(of_kind(kind), None if kind in UNGATED else gate, up)
    expected = FORMULAS[kind](gate.double().numpy(), up.double().numpy()) if shape != (0,) else np.zeros(0)
    # float32 keeps 6e-8 of a value; the smooth functions cancel where they approach zero, hence the absolute part
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("kind", FORMULAS)
def test_the_properties_tell_where_exact_zeros_are(kind):
    activation = of_kind(kind)
    gate, up = torch.randn(2, 4000)
    hidden = activate(activation, None if kind in UNGATED else gate, up)
    assert activation.is_gated == (kind not in UNGATED)
    assert activation.gate_decides == (kind in GATE_DECIDES)
    assert activation.is_sparse == (kind in SPARSE)
    assert ((hidden == 0).float().mean() > 0.3) == activation.is_sparse


@pytest.mark.parametrize("kind", sorted(GATE_DECIDES))
def test_a_gate_that_does_not_fire_leaves_an_exact_zero(kind):
    activation = of_kind(kind)
    gate = torch.tensor([-1.0, -0.0, 0.0, 1e-30, 0.25, 0.2500001, 3.0])
    fires = gate_fires(activation, gate)
    assert fires.tolist() == (gate > activation.threshold).tolist()
    assert (activate(activation, gate, torch.full((7,), 5.0))[~fires] == 0).all()


def test_fatrelu_subtracts_nothing_and_excludes_its_threshold():
    gate = torch.tensor([0.5, 0.5000001, 2.0])
    hidden = activate(Activation("fatrelu", 0.5), gate, torch.ones(3))
    assert hidden.tolist() == [0.0, gate[1].item(), 2.0]


@pytest.mark.parametrize("kind", sorted(set(FORMULAS) - GATE_DECIDES))
def test_gate_fires_is_only_for_gates_that_decide(kind):
    with pytest.raises(AssertionError):
        gate_fires(of_kind(kind), torch.ones(1))


@pytest.mark.parametrize("kind", FORMULAS)
def test_a_gate_too_many_or_too_few_is_refused(kind):
    gate = torch.ones(1) if kind in UNGATED else None
    with pytest.raises(ValueError, match=rf"{kind} {'has no' if kind in UNGATED else 'needs a'} gate"):
        activate(of_kind(kind), gate, torch.ones(1))


@pytest.mark.parametrize("kind", ["swish", "", "RELU", None, 3])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(ValueError, match=r"activation .* is not one of silu_glu, gelu_glu"):
        Activation(kind)


@pytest.mark.parametrize("kind", sorted(set(FORMULAS) - {"fatrelu"}))
@pytest.mark.parametrize("threshold", [0.5, -0.5, math.nan])
def test_a_threshold_for_a_kind_without_one_is_refused(kind, threshold):
    with pytest.raises(ValueError, match=f"{kind} has no threshold, found {threshold}"):
        Activation(kind, threshold)


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf])
def test_a_threshold_that_is_no_number_above_zero_is_refused(threshold):
    with pytest.raises(ValueError, match=rf"fatrelu's threshold is {threshold}, expected a number >= 0"):
        Activation("fatrelu", threshold)
