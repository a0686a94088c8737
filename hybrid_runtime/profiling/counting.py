"""What a profile counts while batches go through the decoder."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hybrid_runtime.config import ModelConfig
from hybrid_runtime.model.observer import FfnPass
from hybrid_runtime.profiling.profile import LayerCounts

OnActive = Callable[[FfnPass, torch.Tensor], None]
"""Gets one network's pass and bool [n, I], which neurons fired for which of its tokens."""


class FiringCounter:
    """An Observer that adds to the layers' counts. on_active: is shown the active sets besides.

    A network's neurons may come in blocks; they are counted when the next network begins, or at `finish`, which the
    caller owes after every batch.
    """

    def __init__(
        self, config: ModelConfig, layers: tuple[LayerCounts, ...], watched: torch.Tensor, on_active: OnActive
    ) -> None:
        self._config = config
        self._layers = layers
        self._watched = watched
        self._on_active = on_active
        self._pending: tuple[FfnPass, torch.Tensor] | None = None
        self._chosen: torch.Tensor | None = None  # float32 [T, E], the last layer's experts

    def see_routing(self, layer_idx: int, experts: torch.Tensor) -> None:
        """Count which experts follow which."""
        chosen = torch.zeros(len(experts), self._config.num_experts).scatter_(1, experts, 1.0)
        if layer_idx > 0 and self._chosen is not None:
            # float32 is exact: a batch has fewer than 2**24 tokens
            self._layers[layer_idx - 1].follows.add_((self._chosen.T @ chosen).long())
        self._chosen = chosen

    def see_neurons(self, ffn: FfnPass, neurons: slice | torch.Tensor, values: torch.Tensor) -> None:
        """Note which of these neurons fired."""
        if self._pending is None or self._pending[0] is not ffn:
            self._count_pending()
            self._pending = ffn, torch.zeros(len(values), self._config.intermediate_size, dtype=torch.bool)
        self._pending[1][:, neurons] = values != 0

    def finish(self) -> None:
        """Count what the batch's last network left, and forget the batch."""
        self._count_pending()
        self._chosen = None

    def _count_pending(self) -> None:
        if self._pending is None:
            return
        ffn, active = self._pending
        self._pending = None
        layer, expert_idx = self._layers[ffn.layer_idx], ffn.expert_idx
        sizes = active.sum(1)  # [n]
        layer.fired[expert_idx] += active.sum(0)
        layer.tokens[expert_idx] += len(active)
        layer.active_squares[expert_idx] += sizes.square().sum()
        watched = active[:, self._watched].float()
        layer.co_fired[expert_idx] += (watched.T @ watched).long()  # exact, as above
        self._on_active(ffn, active)
