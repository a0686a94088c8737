"""How wide each layer's predictors are: first by what there is to tell apart, then wider where it buys most.

PowerInfer (arXiv 2312.12456, section 5.1) starts from a layer's sparsity, corrects by its skewness, and grows until the
model's perplexity holds. Both are in one number, the entropy of a layer's firings given how often each neuron fires: it
is small where few fire, and small where always the same ones do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.profiling.profile import LayerCounts
from hybrid_runtime.store.layout import Quantization

STEP = 16
WORTHWHILE = 1.1  # a rank is left out when the next one takes fewer times its bytes: rows hold whole groups


def layer_bytes(config: ModelConfig, row_format: RowFormat, rank: int) -> int:
    """Of one layer's predictors in memory: fc1 once, fc2 for every expert."""
    experts = max(1, config.num_experts)
    fc1 = rank * row_format.close_row_bytes(config.hidden_size)
    return fc1 + experts * config.intermediate_size * row_format.close_row_bytes(rank)


def ffn_bytes(config: ModelConfig, quantization: Quantization) -> int:
    """Of one layer's neurons in memory."""
    parts = 3 if config.activation.is_gated else 2
    rows = max(1, config.num_experts) * config.intermediate_size * parts
    return rows * quantization.weights.row_bytes(config.hidden_size)


def least_bytes(config: ModelConfig, row_format: RowFormat) -> int:
    """Of the narrowest predictors of all layers."""
    return config.num_hidden_layers * layer_bytes(config, row_format, rank_ladder(config, row_format)[0])


def rank_ladder(config: ModelConfig, row_format: RowFormat) -> list[int]:
    """Ranks worth trying, ascending."""
    ranks = list(range(STEP, max(STEP, config.hidden_size) + 1, STEP))
    ladder: list[int] = []
    for rank in reversed(ranks):
        if not ladder or layer_bytes(config, row_format, rank) * WORTHWHILE <= layer_bytes(
            config, row_format, ladder[-1]
        ):
            ladder.append(rank)
    return ladder[::-1]


def firing_entropy(counts: LayerCounts) -> float:
    """Bits that say which of an expert's neurons fire for a token, to who knows how often each of them does."""
    frequencies = counts.frequencies()  # [E, I]
    entropies = -torch.xlogy(frequencies, frequencies) - torch.xlogy(1 - frequencies, 1 - frequencies)
    routed = counts.tokens.double() / max(1, int(counts.tokens.sum()))
    return float((entropies.sum(1) * routed).sum()) / float(torch.log(torch.tensor(2.0)))


def initial_ranks(
    config: ModelConfig, row_format: RowFormat, layers: Sequence[LayerCounts], budget_bytes: float
) -> list[int]:
    """The ladder's ranks that spend the budget where there is most to tell apart by each; at least the lowest one."""
    entropies = [firing_entropy(layer) for layer in layers]
    ranks = [rank_ladder(config, row_format)[0]] * len(layers)
    while True:
        per_rank = [entropy / rank for entropy, rank in zip(entropies, ranks, strict=True)]
        step = grown_rank(config, row_format, ranks, per_rank, budget_bytes)
        if step is None:
            return ranks
        ranks[step[0]] = step[1]


def widest_rank(config: ModelConfig, row_format: RowFormat, layers: Sequence[LayerCounts], budget_bytes: float) -> int:
    """That any layer may grow to: twice what the whole budget gives to one at first. Memory is set aside for it."""
    widest = 2 * max(initial_ranks(config, row_format, layers, budget_bytes))
    return max(rank for rank in rank_ladder(config, row_format) if rank <= widest)


def grown_rank(
    config: ModelConfig,
    row_format: RowFormat,
    ranks: Sequence[int],
    excess: Sequence[float],
    budget_bytes: float,
    widest: int | None = None,
) -> tuple[int, int] | None:
    """Layer and its next rank where that promises most for its bytes; None where no step fits the budget.

    excess: what each layer could gain, such as the neurons that it names beyond those that fire. widest: no rank above.
    """
    ladder = [rank for rank in rank_ladder(config, row_format) if widest is None or rank <= widest]
    spent = sum(layer_bytes(config, row_format, rank) for rank in ranks)
    best: tuple[float, int, int] | None = None
    for layer_idx, rank in enumerate(ranks):
        wider = next((each for each in ladder if each > rank), None)
        if wider is None:
            continue
        added = layer_bytes(config, row_format, wider) - layer_bytes(config, row_format, rank)
        gain = excess[layer_idx] / added
        if spent + added <= budget_bytes and (best is None or gain > best[0]):
            best = gain, layer_idx, wider
    return None if best is None else best[1:]
