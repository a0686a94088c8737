"""Counts which neurons fire while a model runs through the engine's own forward pass on random tokens, no two alike.

python -m tests.hybrid_runtime.synthetic.firing_counts STORE [TOKENS]   # a table by layer, for real shapes
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from hybrid_kernels.activation import activate
from hybrid_kernels.quantization.op import dequantize_rows
from hybrid_runtime.model import decoder as decoder_module
from hybrid_runtime.model.decoder import Decoder, choose_predictor_mode
from hybrid_runtime.model.kv_cache import KvCache
from hybrid_runtime.model.weights import load_weights
from hybrid_runtime.store.reader import open_store
from hybrid_runtime.synthetic.firing_rates import skew_of


@dataclass
class Firings:
    """fired: by FFN in the order of their first use, bool [T, I], neurons that are not zero; selected: by the mask."""

    fired: list[torch.Tensor]
    selected: list[torch.Tensor | None]
    tokens: torch.Tensor
    logits: torch.Tensor


def run(folder, num_tokens=64, seed=1):
    """One prefill of random tokens, with every FFN's activations looked at."""
    store = open_store(folder)
    config = store.manifest.config
    model = Decoder(config, load_weights(store), choose_predictor_mode(config, None))
    tokens = torch.randperm(config.vocab_size, generator=torch.Generator().manual_seed(seed))[:num_tokens]
    fired, selected = {}, {}
    original = decoder_module.sparse_ffn

    def watched(x, bundles, activation, active=None, **options):
        gate = x @ dense(bundles.gate_proj).T if bundles.has_gate else None
        hidden = activate(activation, gate, x @ dense(bundles.up_proj).T)
        key = bundles.data.data_ptr()
        fired[key] = (hidden != 0) if active is None else (hidden != 0) & active
        selected[key] = active
        return original(x, bundles, activation, active, **options)

    decoder_module.sparse_ffn = watched
    try:
        logits = model.forward(tokens, KvCache(config, num_tokens, "f32"), all_logits=True)
    finally:
        decoder_module.sparse_ffn = original
    return Firings(list(fired.values()), list(selected.values()), tokens, logits)


def dense(matrix):
    return dequantize_rows(matrix.rows, matrix.columns, matrix.row_format)


def overlap(fired):
    """Mean over pairs of successive tokens of |both| / |either|."""
    both, either = (fired[1:] & fired[:-1]).sum(1), (fired[1:] | fired[:-1]).sum(1)
    return (both / either.clamp(min=1)).mean().item()


def main(folder, num_tokens=64):
    firings = run(Path(folder), int(num_tokens))
    print("ffn  selected  fired   by token: least, most   skew    overlap")
    for idx, (fired, selected) in enumerate(zip(firings.fired, firings.selected, strict=True)):
        by_token = fired.float().mean(1)
        masked = fired if selected is None else selected
        print(
            f"{idx:3}  {masked.float().mean():.4f}   {by_token.mean():.4f}  {by_token.min():.4f} {by_token.max():.4f}"
            f"          {skew_of(fired.sum(0).numpy()):.3f}   {overlap(fired):.3f}"
        )
    shares = [fired.float().mean().item() for fired in firings.fired]
    print(
        f"all  mean {sum(shares) / len(shares):.4f}, least {min(shares):.4f}, most {max(shares):.4f}; "
        f"logits finite {bool(firings.logits.isfinite().all())}, std {firings.logits.std():.3f}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
