"""How many rows of projections one decoded token reads, by part: each costs something beyond its bytes."""

from __future__ import annotations

from hybrid_runtime.store.layout import Entry
from hybrid_runtime.store.manifest import Manifest


def projection_rows(manifest: Manifest, *, uses_predictor: bool) -> dict[str, float]:
    """Of attention, router, predictor and head; the embedding's single row and neurons are left out."""
    config = manifest.config
    entries = [entry for part in manifest.parts for entry in part.entries if entry.kind == "rows"]
    routed = config.num_experts_per_tok / config.num_experts if config.num_experts else 1.0
    return {
        "attention": _rows(entries, ".self_attn."),
        "router": _rows(entries, ".mlp.router"),
        "predictor": _rows(entries, ".predictor.") * routed if uses_predictor else 0.0,
        "head": float(config.vocab_size),
    }


def _rows(entries: list[Entry], infix: str) -> float:
    return float(sum(entry.shape[0] for entry in entries if infix in entry.name))
