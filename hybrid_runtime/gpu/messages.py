"""What goes between the two sides in a layer of a token: one block of memory on either, copied as a whole.

From the GPU: the stream after its norm, the experts, their weights, and which of their neurons are cold. Back: the cold
neurons' sum, or their values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybrid_runtime.gpu.device import GpuDevice
from hybrid_runtime.model.token_memory import padded

WORD = 4  # bytes


@dataclass(frozen=True, slots=True)
class Fields:
    """One side's. chosen, counts: int64 [k]; x: float32 [padded H]; weights: float32 [k]; cold: int32 [k, I]."""

    chosen: torch.Tensor
    counts: torch.Tensor
    x: torch.Tensor
    weights: torch.Tensor
    cold: torch.Tensor


class Message:
    """The same fields on the GPU (`there`) and in RAM (`here`)."""

    def __init__(self, device: GpuDevice, slots: int, hidden_size: int, num_neurons: int) -> None:
        sizes = [2 * slots, 2 * slots, padded(hidden_size), slots + slots % 2, slots * num_neurons]
        self._without_lists = sum(sizes[:-1])
        self._here = device.host_memory(sum(sizes), torch.int32)
        self._there = torch.zeros(sum(sizes), dtype=torch.int32, device=device.torch_device)
        self.here, self.there = (_fields(block, sizes, slots) for block in (self._here, self._there))

    def sent_bytes(self, *, with_lists: bool) -> int:
        """What `send` copies."""
        return WORD * (len(self._here) if with_lists else self._without_lists)

    def send(self, *, with_lists: bool) -> None:
        """To RAM, when the stream is so far."""
        end = None if with_lists else self._without_lists
        self._here[:end].copy_(self._there[:end], non_blocking=True)


def _fields(block: torch.Tensor, sizes: list[int], slots: int) -> Fields:
    chosen, counts, x, weights, cold = torch.split(block, sizes)
    return Fields(
        chosen.view(torch.int64),
        counts.view(torch.int64),
        x.view(torch.float32),
        weights.view(torch.float32)[:slots],
        cold.view(slots, -1),
    )
