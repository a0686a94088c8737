"""Routed experts with gradients: every expert sees its tokens as one matrix, and nothing is added in an unordered way.

Rows go to their experts and come back by permutations, whose gradients are permutations too; a scatter-add would add in
another order each time on a GPU. (Attention's gradients on GPUs are not promised to be the same twice either: runs are
equal bit for bit on the CPU.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

ExpertOf = Callable[[int, torch.Tensor], torch.Tensor]
"""(expert_idx, rows: [N, H]) -> [N, H]"""


@dataclass(frozen=True, slots=True)
class Routing:
    """logits: [T, E] float32; experts: [T, k] int64, best first; shares: [T, k], each row's sum is 1."""

    logits: torch.Tensor
    experts: torch.Tensor
    shares: torch.Tensor


def route(x: torch.Tensor, router: torch.Tensor, num_experts_per_tok: int) -> Routing:
    """x: [T, H]; router: [E, H] -> Mixtral's choice: softmax over all in float32, the best k, normalised."""
    logits = functional.linear(x, router).float()
    shares, experts = torch.topk(logits.softmax(dim=-1), num_experts_per_tok, dim=-1)
    return Routing(logits, experts, (shares / shares.sum(dim=-1, keepdim=True)).to(x.dtype))


def mix_experts(x: torch.Tensor, routing: Routing, num_experts: int, expert_of: ExpertOf) -> torch.Tensor:
    """x: [T, H] -> [T, H]: the shares' mean of what each token's experts make of it."""
    num_tokens, per_token = routing.experts.shape
    chosen = routing.experts.flatten()  # [T k]
    order = chosen.argsort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    copies = x.unsqueeze(1).expand(-1, per_token, -1).flatten(0, 1)
    counts = torch.bincount(chosen, minlength=num_experts).tolist()
    rows = torch.split(_permute(copies, order, back), counts)
    outputs = torch.cat([expert_of(idx, each) for idx, each in enumerate(rows)])
    by_token = _permute(outputs, back, order).view(num_tokens, per_token, -1)
    return (by_token * routing.shares.unsqueeze(-1)).sum(dim=1)


def load_balancing_loss(routings: Sequence[Routing], num_experts: int) -> torch.Tensor:
    """Switch Transformer's (arXiv 2101.03961 eq. 4 to 6) as transformers computes it for Mixtral: 1 (times k) is even.

    Over the tokens of all layers together: E times the sum over experts of (share of tokens) x (mean probability).
    """
    probabilities = torch.cat([routing.logits for routing in routings]).softmax(dim=-1).mean(dim=0)  # [E]
    experts = torch.cat([routing.experts for routing in routings])  # [T, k]
    shares = functional.one_hot(experts, num_experts).float().mean(dim=0)  # [k, E]
    return num_experts * (shares * probabilities).sum()


def _permute(rows: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    permuted: torch.Tensor = _Permutation.apply(rows, order, back)  # type: ignore[no-untyped-call]
    return permuted


class _Permutation(torch.autograd.Function):
    """rows[order]; the gradient goes back by the inverse permutation."""

    @staticmethod
    def forward(context, rows, order, back):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN205
        context.save_for_backward(back)
        return rows.index_select(0, order)

    @staticmethod
    def backward(context, gradient):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN205
        (back,) = context.saved_tensors
        return gradient.index_select(0, back), None, None
