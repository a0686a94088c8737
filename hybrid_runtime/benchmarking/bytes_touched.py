"""How many bytes of weights and cache one decoded token reads, by part: what bounds the speed of decoding.

Worked out from shapes and from the rows that the kernels counted. Whole rows count, padding included, because whole
cache lines are read; activations do not, because they stay in the caches.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from hybrid_runtime.model.kv_cache import KvDtype, kv_cache_bytes
from hybrid_runtime.store.layout import Entry
from hybrid_runtime.store.manifest import Manifest

BIAS_BYTES = 4  # float32


@dataclass(frozen=True, slots=True)
class NeuronRows:
    """Rows of each kind that one token reads, summed over layers and experts."""

    gate: float
    up: float
    down: float


@dataclass(frozen=True, slots=True)
class BytesTouched:
    """Bytes of one decoded token by what they belong to. attention: the projections, without the cache."""

    embedding: float
    norms: float
    attention: float
    router: float
    predictor: float
    neurons: float
    head: float
    kv_cache: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.by_part().values())

    def by_part(self) -> dict[str, float]:
        """Name of the part to its bytes."""
        return asdict(self)


def all_neurons(manifest: Manifest) -> NeuronRows:
    """The rows that a token reads when nothing is left out, of the experts that it is routed to."""
    config = manifest.config
    rows = config.num_hidden_layers * max(1, config.num_experts_per_tok) * config.intermediate_size
    return NeuronRows(rows if config.activation.is_gated else 0, rows, rows)


def bytes_touched(
    manifest: Manifest, rows: NeuronRows, *, uses_predictor: bool, mean_length: float, kv_dtype: KvDtype
) -> BytesTouched:
    """mean_length: tokens in the cache that a token attends to, on average, its own included."""
    config = manifest.config
    entries = {entry.name: entry for part in manifest.parts for entry in part.entries}
    experts_share = config.num_experts_per_tok / config.num_experts if config.num_experts else 1.0
    neuron_bias = BIAS_BYTES if config.mlp_bias else 0
    down_biases = _sum(entries, ".down_proj.bias") * experts_share
    row_bytes = manifest.quantization.weights.row_bytes(config.hidden_size)
    embedding, positions = entries["embed_tokens"], entries.get("embed_positions")
    return BytesTouched(
        embedding=_row(embedding) + (_row(positions) if positions is not None else 0),
        norms=sum(entry.num_bytes for name, entry in entries.items() if _is_norm(name)),
        attention=_sum(entries, ".self_attn."),
        router=_sum(entries, ".mlp.router"),
        predictor=_sum(entries, ".predictor.") * experts_share if uses_predictor else 0.0,
        neurons=(rows.gate + rows.up) * (row_bytes + neuron_bias) + rows.down * row_bytes + down_biases,
        head=(embedding if config.tie_word_embeddings else entries["lm_head"]).num_bytes,
        kv_cache=_cache_bytes(manifest, mean_length, kv_dtype),
    )


def num_parameters(manifest: Manifest) -> int:
    """Weights of the model, predictors included."""
    return sum(math.prod(entry.shape) for part in manifest.parts for entry in part.entries)


def _cache_bytes(manifest: Manifest, mean_length: float, kv_dtype: KvDtype) -> float:
    config = manifest.config
    per_layer = kv_cache_bytes(config, 1, kv_dtype) / config.num_hidden_layers
    windows = [config.window(layer_idx) for layer_idx in range(config.num_hidden_layers)]
    return per_layer * sum(mean_length if window is None else min(mean_length, window) for window in windows)


def _is_norm(name: str) -> bool:
    return "layernorm" in name or name in ("norm", "norm.bias")


def _sum(entries: dict[str, Entry], infix: str) -> float:
    return sum(entry.num_bytes for name, entry in entries.items() if infix in name)


def _row(entry: Entry) -> int:
    return entry.row_format.row_bytes(entry.shape[-1])
