"""What takes memory beside the neurons: who it is, how much, and on which device it goes when there is too little VRAM.

First the GPU's own overhead, then layer by layer attention with its norms, router, cache and predictors, then the head:
in this order as long as they fit. A layer's go together, so that who computes its attention also knows which neurons
are active. The embedding stays in RAM, since a token reads one row of it; so does what the GPU is not faster at, which
the plan decides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from hybrid_runtime.model.kv_cache import KvDtype, kv_cache_bytes
from hybrid_runtime.store.manifest import Manifest

Device = Literal["gpu", "ram"]
PartKind = Literal["embedding", "attention", "KV cache", "head", "predictors"]

LAYER_KINDS: Final[tuple[PartKind, ...]] = ("attention", "KV cache", "predictors")
"""Of a layer, which are placed as a whole."""
GPU_KINDS: Final[tuple[PartKind, ...]] = (*LAYER_KINDS, "head")
"""All but the embedding."""
GPU_OVERHEAD_BYTES = 600 << 20  # CUDA's context, its libraries and our buffers (reference: 0.6 GiB assumed)


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that takes memory. layer_idx: None for what belongs to none."""

    kind: PartKind
    layer_idx: int | None
    num_bytes: int


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
        own = sum(sizes[name] for name in of_layer if ".predictor." in name)
        size = own if predictor_bytes is None else predictor_bytes[layer_idx]
        parts += [Part("attention", layer_idx, dense), Part("KV cache", layer_idx, cache)]
        parts += [Part("predictors", layer_idx, size)] if size else []
    embedding = sum(size for name, size in sizes.items() if name.startswith("embed_"))
    outer = sum(size for name, size in sizes.items() if not name.startswith(("layers.", "embed_")))
    if config.tie_word_embeddings:
        outer, embedding = outer + sizes["embed_tokens"], embedding - sizes["embed_tokens"]
    parts.append(Part("head", None, outer))
    if embedding:
        parts.append(Part("embedding", None, embedding))
    return parts


def place_parts(
    parts: Sequence[Part], vram_bytes: int, kinds: Collection[PartKind] = GPU_KINDS
) -> tuple[list[PlacedPart], int]:
    """Every part's device, and the VRAM that is left for neurons; without VRAM everything is in RAM.

    kinds: that the GPU is to have, of LAYER_KINDS all or none.
    """
    left = vram_bytes - GPU_OVERHEAD_BYTES
    if left <= 0:
        return [PlacedPart(part, "ram") for part in parts], 0
    placed, is_full = [], False
    for unit in _units(parts):
        needed = sum(part.num_bytes for part in unit)
        wanted = unit[0].kind in kinds
        fits = wanted and not is_full and needed <= left
        is_full = is_full or (wanted and not fits)  # no other part overtakes what did not fit; neurons do
        left -= needed if fits else 0
        placed += [PlacedPart(part, "gpu" if fits else "ram") for part in unit]
    return placed, left


def bytes_on(placed: Sequence[PlacedPart], device: Device) -> int:
    """Of all parts there."""
    return sum(each.part.num_bytes for each in placed if each.device == device)


def layers_on_gpu(placed: Sequence[PlacedPart]) -> set[int]:
    """Layers whose attention is there."""
    on_gpu = (each.part for each in placed if each.device == "gpu")
    return {part.layer_idx for part in on_gpu if part.kind == "attention" and part.layer_idx is not None}


def _units(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """What is placed as a whole."""
    unit: list[Part] = []
    for part in parts:
        if unit and (part.layer_idx is None or part.layer_idx != unit[0].layer_idx):
            yield unit
            unit = []
        unit.append(part)
    if unit:
        yield unit
