"""Writing the int64 words that kernels take as arguments."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

Word = int | float | np.ndarray | torch.Tensor | None


def as_word(value: Word) -> int:
    """An address for an array or tensor, float32's bits for a float, 0 for None."""
    match value:
        case None:
            return 0
        case int():
            return int(value)
        case float():
            return int(np.float32(value).view(np.int32))
        case np.ndarray():
            return int(value.ctypes.data)
        case torch.Tensor():
            return value.data_ptr()


def words(num_words: int, values: Mapping[int, Word]) -> np.ndarray:
    """int64 [num_words] with the values at their places; the rest 0."""
    array = np.zeros(num_words, dtype=np.int64)
    for place, value in values.items():
        array[place] = as_word(value)
    return array
