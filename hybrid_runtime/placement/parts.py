"""What takes memory beside the neurons: who it is, how much, and on which device it goes when there is too little VRAM.

First the GPU's own overhead, then layer by layer attention with its norms, router and cache, then the head, then the
predictors: in this order as long as they fit. The embedding stays in RAM, since a token reads one row of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hybrid_runtime.config import ModelConfig
from hybrid_runtime.model.kv_cache import KvDtype, kv_cache_bytes
from hybrid_runtime.store.manifest import Manifest

Device = Literal["gpu", "ram"]
PartKind = Literal["embedding", "attention", "KV cache", "head", "predictors"]

GPU_OVERHEAD_BYTES = 600 << 20  # CUDA's context, its libraries and our buffers (reference: 0.6 GiB assumed)


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that is placed as a whole. layer_idx: None for what belongs to none; read_share: of its bytes, what one
    token reads.
    """

    kind: PartKind
    layer_idx: int | None
    num_bytes: int
    read_share: float = 1.0


@dataclass(frozen=True, slots=True)
class PlacedPart:
    """A part and its device."""

    part: Part
    device: Device


def model_parts(
    manifest: Manifest, num_positions: int, kv_dtype: KvDtype, predictor_bytes: Sequence[int] | None
) -> list[Part]:
    """In the order in which they get VRAM, the embedding last. predictor_bytes: by layer, of predictors that lie beside
    the store; None: those in it, if any.
    """
    config = manifest.config
    sizes = {entry.name: entry.num_bytes for part in manifest.parts for entry in part.entries}
    layers = range(config.num_hidden_layers)
    cache = kv_cache_bytes(config, num_positions, kv_dtype) // config.num_hidden_layers
    parts: list[Part] = []
    for layer_idx in layers:
        of_layer = [name for name in sizes if name.startswith(f"layers.{layer_idx}.")]
        dense = sum(sizes[name] for name in of_layer if not name.endswith(".bundles") and ".predictor." not in name)
        parts += [Part("attention", layer_idx, dense), Part("KV cache", layer_idx, cache)]
    embedding = sum(size for name, size in sizes.items() if name.startswith("embed_"))
    outer = sum(size for name, size in sizes.items() if not name.startswith(("layers.", "embed_")))
    if config.tie_word_embeddings:
        outer, embedding = outer + sizes["embed_tokens"], embedding - sizes["embed_tokens"]
    parts.append(Part("head", None, outer))
    for layer_idx in layers:
        own = sum(
            size for name, size in sizes.items() if name.startswith(f"layers.{layer_idx}.") and ".predictor." in name
        )
        size = own if predictor_bytes is None else predictor_bytes[layer_idx]
        if size:
            parts.append(Part("predictors", layer_idx, size, _routed_share(config)))
    if embedding:
        parts.append(Part("embedding", None, embedding, 1 / config.vocab_size))
    return parts


def place_parts(parts: Sequence[Part], vram_bytes: int) -> tuple[list[PlacedPart], int]:
    """Every part's device, and the VRAM that is left for neurons; without VRAM everything is in RAM."""
    left = vram_bytes - GPU_OVERHEAD_BYTES
    if left <= 0:
        return [PlacedPart(part, "ram") for part in parts], 0
    placed, is_full = [], False
    for part in parts:
        fits = part.kind != "embedding" and not is_full and part.num_bytes <= left
        is_full = is_full or (part.kind != "embedding" and not fits)  # nothing overtakes what did not fit
        left -= part.num_bytes if fits else 0
        placed.append(PlacedPart(part, "gpu" if fits else "ram"))
    return placed, 0 if is_full else left


def bytes_on(placed: Sequence[PlacedPart], device: Device) -> int:
    """Of all parts there."""
    return sum(each.part.num_bytes for each in placed if each.device == device)


def _routed_share(config: ModelConfig) -> float:
    return config.num_experts_per_tok / config.num_experts if config.num_experts else 1.0
