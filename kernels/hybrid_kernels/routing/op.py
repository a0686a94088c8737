"""Expert routing: argument checks and dispatch (the reference is the only implementation so far)."""

from __future__ import annotations

import torch

from hybrid_kernels.routing import reference
from hybrid_kernels.routing.reference import ROUTER_SCORES, RouterScore


def route(
    logits: torch.Tensor, num_experts_per_tok: int, score: RouterScore, *, normalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits: [T, E] float32 -> experts [T, k] int64, weights [T, k] float32. Raises ValueError on bad arguments."""
    if score not in ROUTER_SCORES:
        raise ValueError(f"router score {score!r} is not one of {', '.join(ROUTER_SCORES)}")
    if logits.dim() != 2 or not 1 <= num_experts_per_tok <= logits.shape[1]:
        raise ValueError(f"{num_experts_per_tok} experts per token from logits of shape {tuple(logits.shape)}")
    return reference.route(logits, num_experts_per_tok, score, normalize=normalize)
