"""A store's weights in memory as a plan says: what is in the GPU's and in RAM's tier, and nothing of the disk's.

Neurons are read a block at a time past the page cache, and those that stay are copied out, so that the process never
holds more than its tiers and a few blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from hybrid_kernels.tiers.layout import DISK, GPU, RAM
from hybrid_runtime.model.weight_specs import ffn_names
from hybrid_runtime.placement.plan import Plan
from hybrid_runtime.store.direct_file import DirectFile, page_aligned, pages_around
from hybrid_runtime.store.layout import Entry, Part
from hybrid_runtime.store.memory import anonymous_block
from hybrid_runtime.store.reader import Store, Weight, view_entry
from hybrid_runtime.tiers.bundles import TieredBundles

CHUNK_BYTES = 8 << 20
READ_THREADS = 4
ALIGNMENT = 64  # bytes: of a weight in memory


@dataclass(frozen=True, slots=True)
class TieredWeights:
    """By layer, then the embedding's and the head's: dense weights by name; and by layer the networks.

    gpu_bytes, ram_bytes: that the weights take in either memory.
    """

    layers: list[dict[str, Weight]]
    outer: dict[str, Weight]
    networks: list[list[TieredBundles]]
    gpu_bytes: int
    ram_bytes: int


@dataclass(slots=True)
class _Ledger:
    """Bytes that were taken, by tier."""

    taken: dict[int, int]
    device: torch.device | None

    def block(self, tier: int, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes] of a tier's memory; the GPU's is this process's own where it is simulated."""
        self.taken[tier] += num_bytes
        if tier == GPU and self.device is not None:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        return anonymous_block(num_bytes) if num_bytes else torch.zeros(0, dtype=torch.uint8)


def load_tiered(
    store: Store, plan: Plan, tiers: Sequence[torch.Tensor], device: torch.device | None = None
) -> TieredWeights:
    """tiers: by layer uint8 [E, I], as the plan was saved. device: the GPU; None: it is simulated in this memory.

    Raises StoreError for a store that cannot be read.
    """
    config, parts = store.manifest.config, store.manifest.parts
    embed, *of_layers, head = parts
    ledger = _Ledger({GPU: 0, RAM: 0}, device)
    outer: dict[str, Weight] = {}
    layers: list[dict[str, Weight]] = []
    networks: list[list[TieredBundles]] = []
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read") as pool:
        tied = config.tie_word_embeddings
        head_tier = GPU if "head" in plan.gpu_parts else RAM
        outer |= _dense(store, embed, head_tier if tied else RAM, ledger)
        outer |= _dense(store, head, head_tier, ledger)
        if tied and head_tier == GPU and device is not None:  # of which a token reads one row on this side, too
            (mapped,) = store.read_parts([embed], "mmap")
            outer |= {"lm_head": outer["embed_tokens"]} | mapped
        for layer_idx, part in enumerate(of_layers):
            on_gpu = {kind for kind, layers_there in plan.gpu_layers.items() if layer_idx in layers_there}
            weights = _dense(store, part, GPU if "attention" in on_gpu else RAM, ledger, predictors=False)
            weights |= _dense(store, part, GPU if "predictors" in on_gpu else RAM, ledger, predictors=True)
            layers.append(weights)
            hidden = plan.layers[layer_idx].merge == "hidden"
            networks.append(_neurons(store, part, layer_idx, tiers[layer_idx], ledger, pool, keeps_down_rows=hidden))
    return TieredWeights(layers, outer, networks, ledger.taken[GPU], ledger.taken[RAM])


def _dense(
    store: Store, part: Part, tier: int, ledger: _Ledger, *, predictors: bool | None = None
) -> dict[str, Weight]:
    """A part's weights but neurons. predictors: only those, or all others; None: both."""
    entries = [
        entry for entry in part.entries if entry.kind != "bundles" and predictors in (None, ".predictor." in entry.name)
    ]
    starts = np.cumsum([0, *(-(-entry.num_bytes // ALIGNMENT) * ALIGNMENT for entry in entries)]).tolist()
    block = ledger.block(tier, starts[-1])
    weights: dict[str, Weight] = {}
    with DirectFile(store.data_folder / part.file) as file:
        buffer = page_aligned(pages_around(min(CHUNK_BYTES, max((entry.num_bytes for entry in entries), default=1))))
        for entry, start in zip(entries, starts, strict=False):
            target = block[start : start + entry.num_bytes]
            for first in range(0, entry.num_bytes, CHUNK_BYTES):
                last = min(first + CHUNK_BYTES, entry.num_bytes)
                target[first:last] = file.read(entry.offset + first, entry.offset + last, buffer)
            weights[entry.name] = view_entry(target, entry)
    return weights


def _neurons(
    store: Store,
    part: Part,
    layer_idx: int,
    tiers: torch.Tensor,
    ledger: _Ledger,
    pool: ThreadPoolExecutor,
    *,
    keeps_down_rows: bool,
) -> list[TieredBundles]:
    """One layer's networks, without biases. tiers: uint8 [E, I]."""
    config, row_format = store.manifest.config, store.manifest.quantization.weights
    entries = {entry.name: entry for entry in part.entries}
    of_networks = [entries[f"{name}.bundles"] for name in ffn_names(config, layer_idx)]
    _, num_parts, hidden_size = of_networks[0].shape
    row_bytes = row_format.row_bytes(hidden_size)
    blocks = {
        tier: ledger.block(tier, int((tiers == tier).sum()) * num_parts * row_bytes).view(-1, num_parts, row_bytes)
        for tier in (GPU, RAM)
    }
    downs = ledger.block(GPU, int((tiers == RAM).sum()) * row_bytes if keeps_down_rows else 0).view(-1, row_bytes)
    homes = _homes(tiers, blocks, num_parts * row_bytes)
    file = DirectFile(store.data_folder / part.file)
    list(pool.map(lambda task: _fill(file, *task), _fill_tasks(of_networks, tiers, blocks)))
    down_homes = np.zeros(tiers.shape, dtype=np.int64)
    if keeps_down_rows:
        downs.copy_(blocks[RAM][:, -1])
        down_homes[(tiers == RAM).numpy()] = downs.data_ptr() + row_bytes * np.arange(len(downs))
    return [
        TieredBundles(
            homes=homes[idx],
            hot=blocks[GPU],
            ram=blocks[RAM],
            down_rows=downs,
            down_homes=down_homes[idx],
            file=file,
            offset=entry.offset,
            hidden_size=hidden_size,
            row_format=row_format,
        )
        for idx, entry in enumerate(of_networks)
    ]


def _homes(tiers: torch.Tensor, blocks: dict[int, torch.Tensor], bundle_bytes: int) -> np.ndarray:
    """int64 [E, I]: a tier's neurons lie in its block in their order, one network after another."""
    homes = np.full(tiers.shape, DISK, dtype=np.int64)
    for tier, block in blocks.items():
        is_there = (tiers == tier).numpy()
        homes[is_there] = (block.data_ptr() + bundle_bytes * np.arange(len(block))) | tier
    return homes


_Task = tuple[int, int, list[tuple[torch.Tensor, torch.Tensor]]]
"""Bytes of the file, and by tier which bundles among them, int64 [n], go where, uint8 [n, parts, row_bytes]."""


def _fill_tasks(entries: Sequence[Entry], tiers: torch.Tensor, blocks: dict[int, torch.Tensor]) -> list[_Task]:
    num_neurons = entries[0].shape[0]
    bundle_bytes = entries[0].num_bytes // num_neurons
    step = max(1, CHUNK_BYTES // bundle_bytes)
    filled = dict.fromkeys(blocks, 0)
    tasks: list[_Task] = []
    for entry, of_network in zip(entries, tiers, strict=True):
        for start in range(0, num_neurons, step):
            some = of_network[start : start + step]
            targets = []
            for tier, block in blocks.items():
                (places,) = (some == tier).nonzero(as_tuple=True)
                targets.append((places, block[filled[tier] : filled[tier] + len(places)]))
                filled[tier] += len(places)
            if any(len(places) for places, _ in targets):
                first = entry.offset + start * bundle_bytes
                tasks.append((first, first + len(some) * bundle_bytes, targets))
    return tasks


def _fill(file: DirectFile, start: int, stop: int, targets: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    read = file.read(start, stop, page_aligned(pages_around(stop - start)))
    for places, target in targets:
        if len(places):
            bundles = read.view(-1, *target.shape[1:])
            if target.device.type == "cpu":
                torch.index_select(bundles, 0, places, out=target)
            else:
                target.copy_(bundles[places])
