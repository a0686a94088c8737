"""One network's neurons spread over tiers: which bundle is where, and the ways to get at those that a batch needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from hybrid_kernels.packed_matrix import Bundles
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.tiers.layout import DISK, GPU, TIER_BITS
from hybrid_runtime.store.direct_file import DirectFile, page_aligned, pages_around

GATHERED_BYTES = 16 << 20  # of bundles that a batch is given at a time
READ_BYTES = 4 << 20  # of the disk at a time
WORTHWHILE_GAP = 16  # bundles: reading over fewer that nobody needs is quicker than another read


@dataclass(frozen=True, slots=True)
class TieredBundles:
    """homes: int64 [I], see hybrid_kernels/tiers/layout.py; changed by decoding, which moves bundles into the cache.

    hot, ram: uint8 [n, parts, row_bytes], the bundles of the GPU's and of RAM's tier of the whole layer; the homes of
    those are addresses in them. down_rows: uint8 [n, row_bytes], those that the GPU has beside its bundles' own;
    down_homes: int64 [I], their addresses by neuron, 0 where there is none. offset: where the network's bundles begin
    in the layer's file. The biases as in Bundles.
    """

    homes: np.ndarray
    hot: torch.Tensor
    ram: torch.Tensor
    down_rows: torch.Tensor
    down_homes: np.ndarray
    file: DirectFile
    offset: int
    hidden_size: int
    row_format: RowFormat
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @property
    def num_neurons(self) -> int:
        """Of the network (I)."""
        return len(self.homes)

    @property
    def num_parts(self) -> int:
        """Rows of a bundle."""
        return self.hot.shape[1]

    @property
    def has_gate(self) -> bool:
        """Whether the network is a gated linear unit."""
        return self.num_parts == 3

    @property
    def bundle_bytes(self) -> int:
        """Of one neuron."""
        return self.num_parts * self.hot.shape[2]

    def gathered(self, neurons: torch.Tensor) -> Iterator[tuple[torch.Tensor, Bundles]]:
        """neurons: int64 [N], ascending. Yields some of them and their bundles side by side, without the output's bias.

        What is on disk is read; the cache stays as it is. Raises StoreError where that fails.
        """
        step = max(1, GATHERED_BYTES // self.bundle_bytes)
        for start in range(0, len(neurons), step):
            some = neurons[start : start + step]
            data = torch.empty(len(some), *self.hot.shape[1:], dtype=torch.uint8)
            self._gather(some, data)
            yield (
                some,
                Bundles(
                    data,
                    self.hidden_size,
                    self.row_format,
                    gate_bias=None if self.gate_bias is None else self.gate_bias[some],
                    up_bias=None if self.up_bias is None else self.up_bias[some],
                ),
            )

    def _gather(self, neurons: torch.Tensor, data: torch.Tensor) -> None:
        homes = torch.from_numpy(self.homes)[neurons]
        tiers, addresses = homes & TIER_BITS, homes & ~TIER_BITS
        for tier in (tier for tier in range(DISK + 1) if bool((tiers == tier).any())):
            (places,) = (tiers == tier).nonzero(as_tuple=True)
            if tier == DISK:
                self._read(neurons[places], places, data)
                continue
            block = self.hot if tier == GPU else self.ram
            numbers = (addresses[places] - block.data_ptr()) // self.bundle_bytes
            data[places] = block[numbers.to(block.device)].to(data.device)

    def _read(self, neurons: torch.Tensor, places: torch.Tensor, data: torch.Tensor) -> None:
        """From the file, several at once where they lie near each other."""
        buffer = page_aligned(pages_around(READ_BYTES))
        flat, size = data.view(len(data), -1), self.bundle_bytes
        ids = neurons.tolist()
        most = max(1, READ_BYTES // size)
        first = 0
        while first < len(ids):
            last = first
            while (
                last + 1 < len(ids)
                and ids[last + 1] - ids[last] <= WORTHWHILE_GAP
                and ids[last + 1] - ids[first] < most
            ):
                last += 1
            start = self.offset + ids[first] * size
            read = self.file.read(start, start + (ids[last] - ids[first] + 1) * size, buffer)
            wanted = neurons[first : last + 1] - ids[first]
            flat[places[first : last + 1]] = read.view(-1, size)[wanted]
            first = last + 1
