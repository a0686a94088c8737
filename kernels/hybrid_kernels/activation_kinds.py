"""The names of activations; what they mean is in activation.py."""

from __future__ import annotations

from typing import Literal, get_args

ActivationKind = Literal[
    "silu_glu",
    "gelu_glu",
    "gelu_tanh_glu",
    "relu_glu",
    "drelu",
    "fatrelu",
    "relu2_glu",
    "relu",
    "relu2",
    "gelu",
    "silu",
]
ACTIVATION_KINDS: tuple[ActivationKind, ...] = get_args(ActivationKind)
