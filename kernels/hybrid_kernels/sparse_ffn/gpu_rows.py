"""What a neuron makes of its gate's and its up row's products, on a GPU: activation.py's formulas."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated(gate, up, threshold, ACTIVATION: tl.constexpr):
    """gate, up: float32 of one shape; gate is not looked at where the activation has none."""
    if ACTIVATION == "drelu":
        value = tl.maximum(gate, 0.0) * tl.maximum(up, 0.0)
    elif ACTIVATION == "relu_glu":
        value = tl.maximum(gate, 0.0) * up
    elif ACTIVATION == "relu2_glu":
        value = tl.maximum(gate, 0.0) * tl.maximum(gate, 0.0) * up
    elif ACTIVATION == "fatrelu":
        value = tl.where(gate > threshold, gate, 0.0) * up
    elif ACTIVATION == "silu_glu":
        value = silu(gate) * up
    elif ACTIVATION == "gelu_glu":
        value = gelu(gate) * up
    elif ACTIVATION == "gelu_tanh_glu":
        value = gelu_tanh(gate) * up
    else:
        value = activated_up(up, ACTIVATION)
    return value


@triton.jit
def activated_up(up, ACTIVATION: tl.constexpr):
    """Of networks without a gate."""
    if ACTIVATION == "relu":
        value = tl.maximum(up, 0.0)
    elif ACTIVATION == "relu2":
        value = tl.maximum(up, 0.0) * tl.maximum(up, 0.0)
    elif ACTIVATION == "gelu":
        value = gelu(up)
    else:
        tl.static_assert(ACTIVATION == "silu")
        value = silu(up)
    return value


@triton.jit
def silu(x):
    """Of float32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu(x):
    """By the error function."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    """Its approximation; tanh(t) is 1 - 2 / (exp(2 t) + 1), which no size of t makes NaN."""
    t = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return 0.5 * x * (2.0 - 2.0 / (tl.exp(2.0 * t) + 1.0))
