"""What a feed-forward neuron does with its gate and up values; which of them leave exact zeros behind.

silu_glu, gelu_glu, gelu_tanh_glu    smooth(gate) * up                      no exact zeros
relu_glu                             max(0, gate) * up                      ReluLLaMA, SmallThinker
drelu                                max(0, gate) * max(0, up)              TurboSparse eq. 2, Bamboo
fatrelu                              (gate > T ? gate : 0) * up             ProSparse; nothing is subtracted
relu2_glu                            max(0, gate)^2 * up                    BitNet
relu, relu2                          max(0, up), max(0, up)^2; no gate      OPT, Arcee
gelu, silu                           smooth(up); no gate
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from hybrid_kernels.activation_kinds import ACTIVATION_KINDS, ActivationKind

_GATED = frozenset({"silu_glu", "gelu_glu", "gelu_tanh_glu", "relu_glu", "drelu", "fatrelu", "relu2_glu"})
_SPARSE_GATE = frozenset({"relu_glu", "drelu", "fatrelu", "relu2_glu"})
_SPARSE_UP = frozenset({"drelu", "relu", "relu2"})


@dataclass(frozen=True, slots=True)
class Activation:
    """An activation by name; threshold is fatrelu's T, which must not be negative, and 0 for the others."""

    kind: ActivationKind
    threshold: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown kind or a threshold that the kind does not have."""
        if self.kind not in ACTIVATION_KINDS:
            raise ValueError(f"activation {self.kind!r} is not one of {', '.join(ACTIVATION_KINDS)}")
        if self.kind != "fatrelu" and self.threshold != 0.0:
            raise ValueError(f"{self.kind} has no threshold, found {self.threshold}")
        if not (math.isfinite(self.threshold) and self.threshold >= 0.0):
            raise ValueError(f"fatrelu's threshold is {self.threshold}, expected a number >= 0")

    @property
    def is_gated(self) -> bool:
        """Whether the FFN has a gate_proj."""
        return self.kind in _GATED

    @property
    def gate_decides(self) -> bool:
        """Whether the gate's value alone can make a neuron exactly zero."""
        return self.kind in _SPARSE_GATE

    @property
    def is_sparse(self) -> bool:
        """Whether neurons are exactly zero for some inputs."""
        return self.kind in _SPARSE_GATE or self.kind in _SPARSE_UP


def gate_fires(activation: Activation, gate: torch.Tensor) -> torch.Tensor:
    """gate: any shape -> bool, False where the gate alone makes the neuron zero. Only where gate_decides."""
    assert activation.gate_decides
    return gate > activation.threshold


def activate(activation: Activation, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """gate, up: [..., I] float32 before activation (gate None where there is none) -> [..., I]."""
    if (gate is not None) != activation.is_gated:
        raise ValueError(f"{activation.kind} {'needs a' if activation.is_gated else 'has no'} gate")
    if gate is None:
        return _ungated(activation.kind, up)
    match activation.kind:
        case "silu_glu":
            return functional.silu(gate) * up
        case "gelu_glu":
            return functional.gelu(gate) * up
        case "gelu_tanh_glu":
            return functional.gelu(gate, approximate="tanh") * up
        case "relu_glu":
            return functional.relu(gate) * up
        case "drelu":
            return functional.relu(gate) * functional.relu(up)
        case "relu2_glu":
            return functional.relu(gate).square() * up
        case _:
            return torch.where(gate > activation.threshold, gate, 0) * up


def _ungated(kind: ActivationKind, up: torch.Tensor) -> torch.Tensor:
    match kind:
        case "relu":
            return functional.relu(up)
        case "relu2":
            return functional.relu(up).square()
        case "gelu":
            return functional.gelu(up)
        case _:
            return functional.silu(up)
