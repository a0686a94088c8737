"""What the operations of one token's program share: vectors that one writes and the next reads, and their words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybrid_kernels.native import input_layout as input_words
from hybrid_kernels.native.arguments import Word
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.row_codes import format_code, num_groups, vector_columns
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.model.weights import Norm

PADDING = 128  # columns: vectors are as long as the largest group wants them


@dataclass(frozen=True, slots=True)
class TokenMemory:
    """stream, middle: float32 [H], the residual stream before attention and after it. chosen: int64 [slots], the
    experts of the token; expert_weights: float32 [slots]. selected: int32 [slots, I], what predictors selected, in
    blocks of block neurons with counts: int64 [slots, blocks]; None where nothing does. scratch: uint8, scratch_stride
    bytes for every worker; read_rows: int64 [workers, 8], gate, up and down rows that each has read.
    """

    config: ModelConfig
    stream: np.ndarray
    middle: np.ndarray
    chosen: np.ndarray
    expert_weights: np.ndarray
    selected: np.ndarray | None
    counts: np.ndarray
    block: int
    scratch: np.ndarray
    scratch_stride: int
    read_rows: np.ndarray

    @property
    def num_slots(self) -> int:
        """Feed-forward networks that a token goes through in a layer."""
        return len(self.chosen)

    def vector_words(self, x: np.ndarray, norm: Norm | None, row_format: RowFormat, columns: int) -> dict[int, Word]:
        """The words of a kernel's input."""
        kind = input_words.NO_NORM
        if norm is not None:
            kind = input_words.RMS_NORM if self.config.norm == "rms" else input_words.LAYER_NORM
        return {
            input_words.X: x,
            input_words.NORM_KIND: kind,
            input_words.NORM_WEIGHT: None if norm is None else norm.weight,
            input_words.NORM_BIAS: None if norm is None else norm.bias,
            input_words.EPS: float(self.config.norm_eps),
            input_words.COLUMNS: columns,
            input_words.VECTOR_COLUMNS: vector_columns(row_format, columns),
            input_words.CODE: format_code(row_format),
            input_words.GROUPS: num_groups(row_format, columns),
            input_words.VALUE_BYTES: row_format.value_bytes(columns),
            input_words.SCRATCH: self.scratch,
            input_words.SCRATCH_STRIDE: self.scratch_stride,
        }


def padded(size: int) -> int:
    """Floats of a vector that every format's kernels can read."""
    return -(-size // PADDING) * PADDING
