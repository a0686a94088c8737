"""Where every weight of a converted model lies: computed from the configuration alone, before a byte is read.

A store is a folder:

    store.json                 the manifest, replaced atomically: this format's version, the ModelConfig, the parts
    data-<id>/embed.bin        embeddings (and learned positions)
    data-<id>/layer-00000.bin  one layer: norms, attention, router, and its neurons as bundles
    data-<id>/head.bin         the last norm and, unless tied, the head
    data-<id>/tokenizer/       tokenizer files, chat template

A bundle is one neuron: its gate row, up row and transposed down row side by side in `row_format`'s layout, the unit
that later moves between tiers. Matrices and sets of bundles start at multiples of 4096 bytes, as direct reads need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.model.weight_specs import WeightSpec, ffn_names, ffn_weights, global_weights, layer_weights

EntryKind = Literal["vector", "rows", "bundles"]

PAGE = 4096  # bytes: what O_DIRECT reads start at
CACHE_LINE = 64  # bytes
F32 = RowFormat("f32")


@dataclass(frozen=True, slots=True)
class Entry:
    """One weight in a part. shape: [n] (vector), [rows, columns] (rows), [neurons, parts, hidden_size] (bundles)."""

    name: str
    kind: EntryKind
    shape: tuple[int, ...]
    row_format: RowFormat
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in the part."""
        if self.kind == "vector":
            return self.shape[0] * 4
        *rows, columns = self.shape
        total = self.row_format.row_bytes(columns)
        for size in rows:
            total *= size
        return total


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a store, written whole or not at all."""

    file: str
    entries: tuple[Entry, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        last = self.entries[-1]
        return last.offset + last.num_bytes


@dataclass(frozen=True, slots=True)
class Quantization:
    """What the caller asked for: `weights` for most of the model; some stay at 8 bits under q4.

    Embedding and head are a small share of the bytes (a token reads one row of the embedding), and of the error a large
    one. So are keys that several queries share: each of those sees a key's error, and a softmax raises e to it.
    """

    weights: RowFormat

    @property
    def finer(self) -> RowFormat:
        """The format of the embedding, the head and shared keys."""
        return RowFormat("q8", self.weights.group) if self.weights.kind == "q4" else self.weights

    def format_of(self, role: str) -> RowFormat:
        """The format of a weight with this role (weight_specs.Role)."""
        if role in ("vector", "router"):
            return F32
        return self.finer if role in ("embedding", "head", "shared_keys") else self.weights


def lay_out(config: ModelConfig, quantization: Quantization, predictor_ranks: Mapping[str, int]) -> tuple[Part, ...]:
    """Every part of the store, in the order in which they are written. predictor_ranks: by the FFN's prefix."""
    outer = list(global_weights(config))
    embeddings = [spec for spec in outer if spec.role == "embedding"]
    head = [spec for spec in outer if spec.role != "embedding"]
    parts = [_part("embed.bin", _plain(embeddings, quantization, predictor_ranks))]
    for layer_idx in range(config.num_hidden_layers):
        entries = _layer_entries(config, layer_idx, quantization, predictor_ranks)
        parts.append(_part(f"layer-{layer_idx:05d}.bin", entries))
    parts.append(_part("head.bin", _plain(head, quantization, predictor_ranks)))
    return tuple(parts)


def _layer_entries(
    config: ModelConfig, layer_idx: int, quantization: Quantization, predictor_ranks: Mapping[str, int]
) -> Iterator[Entry]:
    specs = [spec for spec in layer_weights(config, layer_idx) if ".mlp." not in spec.name or spec.role == "router"]
    yield from _plain(specs, quantization, predictor_ranks)
    num_parts = 3 if config.activation.is_gated else 2
    for ffn in ffn_names(config, layer_idx):
        shape = (config.intermediate_size, num_parts, config.hidden_size)
        yield Entry(f"{ffn}.bundles", "bundles", shape, quantization.weights, 0)
        rest = [spec for spec in ffn_weights(ffn, config) if spec.role != "neurons"]
        yield from _plain(rest, quantization, predictor_ranks)


def _plain(specs: list[WeightSpec], quantization: Quantization, predictor_ranks: Mapping[str, int]) -> Iterator[Entry]:
    for spec in specs:
        rank = predictor_ranks.get(spec.name.rsplit(".predictor.", 1)[0], 0)
        shape = tuple(rank if size is None else size for size in spec.shape)
        kind: EntryKind = "vector" if spec.role == "vector" else "rows"
        yield Entry(spec.name, kind, shape, quantization.format_of(spec.role), 0)


def _part(file: str, entries: Iterator[Entry]) -> Part:
    placed = []
    offset = 0
    for entry in entries:
        alignment = CACHE_LINE if entry.kind == "vector" else PAGE
        offset = -(-offset // alignment) * alignment
        placed.append(Entry(entry.name, entry.kind, entry.shape, entry.row_format, offset))
        offset += placed[-1].num_bytes
    return Part(file, tuple(placed))
