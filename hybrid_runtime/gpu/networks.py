"""A layer's hot neurons as the GPU's kernels want them, from what was loaded by tiers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hybrid_kernels.tiers.gpu import HotNetworks
from hybrid_kernels.tiers.layout import GPU, TIER_BITS
from hybrid_runtime.tiers.bundles import TieredBundles


def hot_networks(networks: Sequence[TieredBundles], device: torch.device) -> HotNetworks:
    """networks: a layer's; their hot bundles and down rows are there already, or are copied."""
    first = networks[0]
    homes = np.stack([network.homes for network in networks])
    is_hot = (homes & TIER_BITS) == GPU
    rows = _numbers(homes & ~TIER_BITS, is_hot, first.hot.data_ptr(), first.bundle_bytes)
    down_homes = np.stack([network.down_homes for network in networks])
    has_down = bool(len(first.down_rows))
    down_of = _numbers(down_homes, down_homes != 0, first.down_rows.data_ptr(), first.hot.shape[2])
    return HotNetworks(
        first.hot.to(device),
        torch.from_numpy(rows).to(device),
        int(is_hot.sum(1).max()),
        first.hidden_size,
        first.row_format,
        down=first.down_rows.to(device) if has_down else None,
        down_of=torch.from_numpy(down_of).to(device) if has_down else None,
        gate_bias=_biases([network.gate_bias for network in networks], device),
        up_bias=_biases([network.up_bias for network in networks], device),
        down_bias=_biases([network.down_bias for network in networks], device),
    )


def _numbers(addresses: np.ndarray, is_there: np.ndarray, start: int, size: int) -> np.ndarray:
    """int32: which of the things of that size at start each address is; -1 for those that are not there."""
    return np.where(is_there, (addresses - start) // size, -1).astype(np.int32)


def _biases(biases: Sequence[torch.Tensor | None], device: torch.device) -> torch.Tensor | None:
    """float32 [E, ...]; None where networks have none."""
    there = [bias for bias in biases if bias is not None]
    return torch.stack(there).to(device) if there else None
