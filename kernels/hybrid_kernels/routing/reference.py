"""Which experts of a mixture a token goes to, and with which weights.

softmax          softmax over all experts, the largest k, renormalised to sum 1     Mixtral
topk_sigmoid     the k largest logits, sigmoid of those, renormalised               SmallThinker
topk_softmax     the k largest logits, softmax over those                           SmallThinker, by configuration
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

RouterScore = Literal["softmax", "topk_sigmoid", "topk_softmax"]
ROUTER_SCORES: tuple[RouterScore, ...] = get_args(RouterScore)


def route(
    logits: torch.Tensor, num_experts_per_tok: int, score: RouterScore, *, normalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits: [T, E] float32 -> experts [T, k] int64, weights [T, k] float32, largest first.

    normalize: whether the k weights are divided by their sum (softmax over only k already sums to 1).
    """
    if score == "softmax":
        weights, experts = logits.softmax(dim=-1).topk(num_experts_per_tok, dim=-1)
    else:
        chosen, experts = logits.topk(num_experts_per_tok, dim=-1)
        weights = chosen.sigmoid() if score == "topk_sigmoid" else chosen.softmax(dim=-1)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return experts, weights
