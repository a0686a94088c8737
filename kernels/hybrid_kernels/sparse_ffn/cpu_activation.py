"""activation.py's functions of one neuron, compiled."""

from __future__ import annotations

import math

import numba

from hybrid_kernels.activation_kinds import ACTIVATION_KINDS

_SILU, _GELU, _GELU_TANH, _RELU_GLU, _DRELU, _FATRELU, _RELU2_GLU, _RELU, _RELU2, _PLAIN_GELU, _PLAIN_SILU = range(11)
assert ACTIVATION_KINDS[_SILU] == "silu_glu"
assert ACTIVATION_KINDS[_PLAIN_SILU] == "silu"


@numba.njit(inline="always")
def is_silenced(kind: int, threshold: float, gate: float) -> bool:
    """Whether the gate alone makes the neuron zero."""
    return _RELU_GLU <= kind <= _RELU2_GLU and not gate > threshold


@numba.njit(error_model="numpy")
def activate(kind: int, gate: float, up: float) -> float:
    """The neuron's value, for a gate that is not silenced."""
    if kind == _SILU:
        return gate / (1.0 + math.exp(-gate)) * up
    if kind == _GELU:
        return float(_gelu(gate) * up)
    if kind == _GELU_TANH:
        return float(_gelu_tanh(gate) * up)
    if kind in (_RELU_GLU, _FATRELU):
        return gate * up
    if kind == _DRELU:
        return gate * max(up, 0.0)
    if kind == _RELU2_GLU:
        return gate * gate * up
    if kind == _RELU:
        return max(up, 0.0)
    if kind == _RELU2:
        return max(up, 0.0) ** 2
    if kind == _PLAIN_GELU:
        return float(_gelu(up))
    return up / (1.0 + math.exp(-up))


@numba.njit(error_model="numpy")
def _gelu(value: float) -> float:
    return 0.5 * value * (1.0 + math.erf(value * math.sqrt(0.5)))


@numba.njit(error_model="numpy")
def _gelu_tanh(value: float) -> float:
    return 0.5 * value * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (value + 0.044715 * value**3)))
