"""Uninitialised memory that shows, an independent reader of packed rows, and random bundles."""

import numpy as np
import pytest
import torch

from hybrid_kernels.packed_matrix import Bundles, PackedMatrix
from hybrid_kernels.quantization.reference import quantize_rows


@pytest.fixture(autouse=True)
def _same_circumstances():
    """The same numbers in every run, and NaN from torch.empty: what is not written cannot look right by luck.

    One thread of torch's: beside another test process, threads wait for each other longer than these small sums take.
    """
    torch.default_generator.manual_seed(0)  # torch.manual_seed formats a stack trace for every accelerator
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(torch_threads)


@pytest.fixture
def decode_rows():
    """The layout of row_format.py and of gpu.md read word by word, in numpy and Python's integers."""

    def decode(rows, columns, row_format) -> np.ndarray:
        return np.stack([_decode_row(bytes(row.tolist()), columns, row_format) for row in rows])

    return decode


def _decode_row(row: bytes, columns: int, row_format) -> np.ndarray:
    if row_format.kind == "f32":
        return np.frombuffer(row, "<f4", columns).astype(np.float64)
    if row_format.kind == "bf16":  # the upper half of a float32
        return (np.frombuffer(row, "<u2", columns).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    group = row_format.group
    num_groups = -(-columns // group)
    value_bytes = num_groups * group if row_format.kind == "q8" else num_groups * group // 2
    scales = np.frombuffer(row, "<f2", num_groups, value_bytes).astype(np.float64)
    values = np.zeros(num_groups * group)
    if row_format.kind == "q8":
        values[:] = np.frombuffer(row, np.int8, num_groups * group)
    else:
        words = np.frombuffer(row, "<u4", num_groups * group // 8).tolist()
        for word_idx, word in enumerate(words):
            group_idx, j = divmod(word_idx, group // 8)
            for i in range(8):
                values[group_idx * group + (group // 8) * i + j] = ((word >> (4 * i)) & 15) - 8
    return (values.reshape(num_groups, group) * scales[:, None]).reshape(-1)[:columns]


@pytest.fixture
def random_matrix():
    """A packed matrix of gaussian weights that keeps a product's size near its input's."""

    def make(num_rows, columns, row_format, seed=0) -> PackedMatrix:
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(num_rows, columns, generator=generator) / columns**0.5
        return PackedMatrix(quantize_rows(weights, row_format), columns, row_format)

    return make


@pytest.fixture
def random_bundles():
    """Neurons of one FFN, with gaussian weights and, if asked for, biases."""

    def make(num_neurons, hidden_size, row_format, *, gated, biases=False, seed=0) -> Bundles:
        generator = torch.Generator().manual_seed(seed)
        num_parts = 3 if gated else 2
        weights = torch.randn(num_neurons * num_parts, hidden_size, generator=generator) / hidden_size**0.5
        data = quantize_rows(weights, row_format).view(num_neurons, num_parts, row_format.row_bytes(hidden_size))
        vectors = {}
        if biases:
            names = ("gate_bias", "up_bias") if gated else ("up_bias",)
            vectors = {name: torch.randn(num_neurons, generator=generator) / 4 for name in names}
            vectors["down_bias"] = torch.randn(hidden_size, generator=generator)
        return Bundles(data, hidden_size, row_format, **vectors)

    return make
