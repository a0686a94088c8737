"""Expert routing on a GPU: which experts a token goes to, without asking the host."""

from __future__ import annotations

import torch
import triton

from hybrid_kernels.routing.gpu_kernels import route_kernel
from hybrid_kernels.routing.reference import RouterScore


def route(
    logits: torch.Tensor, num_experts_per_tok: int, score: RouterScore, *, normalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits: [T, E] float32, contiguous -> experts [T, k] int32, weights [T, k] float32, largest first."""
    num_tokens, num_experts = logits.shape
    experts = torch.empty(num_tokens, num_experts_per_tok, dtype=torch.int32, device=logits.device)
    weights = torch.empty(num_tokens, num_experts_per_tok, device=logits.device)
    if num_tokens:
        route_kernel[(num_tokens,)](
            logits,
            experts,
            weights,
            NUM_EXPERTS=num_experts,
            CHOSEN=num_experts_per_tok,
            SCORE=score,
            NORMALIZES=normalize,
            BLOCK=triton.next_power_of_2(num_experts),
            SLOTS=triton.next_power_of_2(num_experts_per_tok),
        )
    return experts, weights
