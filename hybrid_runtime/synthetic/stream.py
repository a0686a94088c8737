"""What the residual stream of a synthetic model is made of, known before a token has run.

Its first coordinate is the same for every token in every layer: the embedding has a constant there, and nothing that
is added later touches it. So a weight in a row's first column is a bias. All other coordinates are random by token;
attention and FFNs add so little to them that the sum over all layers is a correction, not a guess.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.config import ModelConfig

CONSTANT = 2.0  # the first coordinate
EMBEDDING_STD = 1.0  # of the others, as they enter the first layer
POSITION_STD = 0.1  # of learned positions, where the model has them
ATTENTION_STD = 0.03  # what one layer's attention adds, for a token that attends to one position alone
FFN_STD = 0.03  # what one layer's FFN adds
_ATTENTION_SPREAD = 0.3  # share of ATTENTION_STD squared that is left when a token attends to many positions


@dataclass(frozen=True, slots=True)
class Stream:
    """variances: float64 [H], over tokens, of the stream before the FFN of one layer; 0 for the first coordinate."""

    variances: torch.Tensor

    @property
    def rms(self) -> float:
        """Its root mean square, which an RMSNorm divides by."""
        return math.sqrt((float(self.variances.sum()) + CONSTANT**2) / len(self.variances))


def stream_before_ffn(config: ModelConfig, layer_idx: int, embedding: RowFormat) -> Stream:
    """The stream as the FFN of this layer finds it. embedding: in which the constant takes a whole group for itself."""
    added = (layer_idx + 1) * _ATTENTION_SPREAD * ATTENTION_STD**2 + layer_idx * FFN_STD**2
    if config.learned_position_offset is not None:
        added += POSITION_STD**2
    variances = torch.full((config.hidden_size,), EMBEDDING_STD**2 + added, dtype=torch.float64)
    variances[1 : max(embedding.group, 1)] = added
    variances[0] = 0.0
    return Stream(variances)
