"""One token through the whole model as one program of compiled kernels: a single call from Python."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from hybrid_kernels.team import Operation, Program, Team
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.model.kv_cache import KvCache
from hybrid_runtime.model.token_operations import TokenOperations
from hybrid_runtime.model.weights import DecoderWeights


class TokenProgram:
    """The program of one decoder with one cache. `step` computes one token; step_s: seconds that the last one took."""

    def __init__(
        self, config: ModelConfig, weights: DecoderWeights, cache: KvCache, team: Team, *, masks: bool
    ) -> None:
        self._team = team
        self._operations = TokenOperations(config, weights, cache, team, masks=masks)
        self.step_s = 0.0
        self.program: Program = team.program(list(_all_operations(self._operations, weights)))

    @property
    def read_rows(self) -> np.ndarray:
        """int64 [workers, 8]: gate, up and down rows that each has read."""
        return self._operations.read_rows

    def step(self, token: int, position: int, num_positions: int) -> torch.Tensor:
        """Logits [V] float32 after one more token. Appends to the cache, whose length the caller advances.

        num_positions: how long the sequence is, or its prompt, which longrope rotates by. The tensor is the program's
        own and overwritten by the next step.
        """
        self._operations.set_token(token, position, num_positions)
        before_s = self._team.kernel_s
        self._team.run(self.program)
        self.step_s = self._team.kernel_s - before_s
        return self._operations.logits


def _all_operations(operations: TokenOperations, weights: DecoderWeights) -> Iterator[Operation]:
    yield operations.begin()
    for layer_idx, layer in enumerate(weights.layers):
        yield from operations.attention(layer_idx)
        yield from operations.selection(layer_idx)
        yield from operations.neurons.operations(layer_idx, layer, *operations.tap("post_norm", layer))
    yield operations.head()
