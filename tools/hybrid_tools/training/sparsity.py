"""How sparse a trained model is, and what it costs to drop neurons: per layer, per expert, per neuron.

A value counts as zero when it is exactly zero. What is dropped is chosen token by token: all but the `share` of one
network's neurons whose |h_i| * ||column i of down_proj|| is largest, which is the size of what the neuron adds to the
residual stream (TurboSparse's Table 3; CETT in ReLU^2 Wins, arXiv 2402.03804).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hybrid_runtime.config import ModelConfig
from hybrid_runtime.model.weight_specs import ffn_names
from hybrid_tools.training.held_out import HeldOut, mean_losses
from hybrid_tools.training.network import Weights

SPARSE_FROM = 0.01


@dataclass(frozen=True, slots=True)
class Firing:
    """How often each neuron was not zero. counts: by layer, [experts, I] int64; rows: by layer, [experts] int64, the
    tokens that each expert saw. A dense network is one expert.
    """

    counts: tuple[torch.Tensor, ...]
    rows: tuple[torch.Tensor, ...]

    def zero_share(self, layer_idx: int) -> float:
        """Share of exact zeros over the layer's tokens and their experts."""
        counts, rows = self.counts[layer_idx], self.rows[layer_idx]
        return 1.0 - float(counts.sum()) / (float(rows.sum()) * counts.shape[1])

    def expert_zero_shares(self, layer_idx: int) -> list[float]:
        """The same for each expert over the tokens that it saw; NaN for an expert that saw none."""
        counts, rows = self.counts[layer_idx], self.rows[layer_idx]
        return [
            1.0 - float(each.sum()) / (float(seen) * counts.shape[1]) if seen else math.nan
            for each, seen in zip(counts, rows, strict=True)
        ]

    @property
    def mean_zero_share(self) -> float:
        """Mean over layers."""
        return sum(map(self.zero_share, range(len(self.counts)))) / len(self.counts)

    def cumulative(self, layer_idx: int) -> torch.Tensor:
        """[experts * I] float64, rising to 1: the share of the layer's firings that its first i + 1 neurons make, the
        most frequent first; zeros where nothing fired.
        """
        counts = self.counts[layer_idx].flatten().sort(descending=True).values.double().cumsum(0)
        return counts / counts[-1].clamp(min=1)

    def neurons_for(self, share: float, layer_idx: int) -> float:
        """The share of the layer's neurons, most frequent first, that makes this share of all its firings."""
        cumulative = self.cumulative(layer_idx)
        return float((cumulative < share).sum() + 1) / len(cumulative)

    @property
    def is_sparse(self) -> bool:
        """Whether zeros are a habit: SiLU underflows to zero now and then."""
        return self.mean_zero_share > SPARSE_FROM


def count_firing(config: ModelConfig, weights: Weights, held_out: HeldOut) -> tuple[Firing, dict[str, float]]:
    """Run the held-out text once: which neurons fired, and the losses by file."""
    num_experts = max(1, config.num_experts)
    counts = [torch.zeros(num_experts, config.intermediate_size, dtype=torch.int64) for _ in _layers(config)]
    rows = [torch.zeros(num_experts, dtype=torch.int64) for _ in _layers(config)]

    def count(layer_idx: int, expert_idx: int, hidden: torch.Tensor) -> torch.Tensor:
        counts[layer_idx][expert_idx] += (hidden != 0).sum(dim=0).cpu()
        rows[layer_idx][expert_idx] += hidden.shape[0]
        return hidden

    losses = mean_losses(config, weights, held_out, count)
    return Firing(tuple(counts), tuple(rows)), losses


def losses_when_kept(
    config: ModelConfig, weights: Weights, held_out: HeldOut, shares: tuple[float, ...]
) -> dict[float, float]:
    """Mean loss over all held-out text when each token keeps only this share of the neurons of each network."""
    norms = _down_norms(config, weights)
    losses = {}
    for share in shares:
        num_kept = max(1, round(share * config.intermediate_size))

        def keep(layer_idx: int, expert_idx: int, hidden: torch.Tensor, num_kept: int = num_kept) -> torch.Tensor:
            return keep_largest(hidden, norms[layer_idx, expert_idx], num_kept)

        losses[share] = mean_losses(config, weights, held_out, keep)["all"]
    return losses


def keep_largest(hidden: torch.Tensor, norms: torch.Tensor, num_kept: int) -> torch.Tensor:
    """hidden: [T, I]; norms: [I] -> hidden with zeros but at each row's num_kept largest |h_i| * norms_i."""
    largest = (hidden.abs() * norms).topk(num_kept, dim=-1).indices
    return torch.zeros_like(hidden).scatter(-1, largest, hidden.gather(-1, largest))


def _down_norms(config: ModelConfig, weights: Weights) -> Mapping[tuple[int, int], torch.Tensor]:
    return {
        (layer_idx, expert_idx): weights[f"{ffn}.down_proj"].detach().norm(dim=0)
        for layer_idx in _layers(config)
        for expert_idx, ffn in enumerate(ffn_names(config, layer_idx))
    }


def _layers(config: ModelConfig) -> range:
    return range(config.num_hidden_layers)
