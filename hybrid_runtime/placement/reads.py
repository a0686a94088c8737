"""How often a token reads each neuron's rows: what placement weighs.

Without a predictor every gate of a routed expert is read, and the rest of a bundle where the gate fires. With one, only
bundles of named neurons are; it names more than fire, in proportion to how often they fire as far as anybody knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hybrid_runtime.benchmarking.bytes_touched import NeuronRows
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.profiling.profile import Profile


@dataclass(frozen=True, slots=True)
class Reading:
    """named_for_one: neurons that the predictor names for one that fires; None: there is none, all gates are read.
    gates_for_one: gates that fire for one neuron that fires, at least 1. every_row: nothing is left out.
    """

    named_for_one: float | None
    gates_for_one: float
    every_row: bool = False


def expected_reads(profile: Profile, config: ModelConfig, reading: Reading) -> list[torch.Tensor]:
    """By layer float64 [E, I] from 0 to 1: bundles a token reads of the neuron, a third for each of its three rows."""
    rows = 3 if config.activation.is_gated else 2
    layers = range(len(profile.layers))
    return [torch.stack(_row_reads(profile, config, layer_idx, reading)).sum(0) / rows for layer_idx in layers]


def expected_rows(profile: Profile, config: ModelConfig, reading: Reading) -> list[NeuronRows]:
    """Rows that one token reads, by layer."""
    layers = range(len(profile.layers))
    return [NeuronRows(*(float(rows.sum()) for rows in _row_reads(profile, config, idx, reading))) for idx in layers]


def total_rows(rows: Sequence[NeuronRows]) -> NeuronRows:
    """Over all layers."""
    return NeuronRows(*(sum(getattr(each, kind) for each in rows) for kind in ("gate", "up", "down")))


def _row_reads(
    profile: Profile, config: ModelConfig, layer_idx: int, reading: Reading
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gate, up and down rows of each neuron, float64 [E, I], a token."""
    fired = profile.expected_firings(layer_idx)
    tokens = profile.layers[layer_idx].tokens.double() / max(1, profile.num_tokens)
    routed = tokens.unsqueeze(1).expand_as(fired)
    if reading.every_row:
        return routed if config.activation.is_gated else torch.zeros_like(fired), routed, routed
    named = routed if reading.named_for_one is None else torch.minimum(fired * reading.named_for_one, routed)
    down = torch.minimum(fired, named)  # a strict predictor leaves some out that would fire
    if not config.activation.is_gated:
        return torch.zeros_like(fired), named, down
    return named, torch.minimum(fired * reading.gates_for_one, named), down
