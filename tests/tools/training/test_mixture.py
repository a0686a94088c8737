"""Routed experts against a loop over tokens, and the balancing loss against transformers'."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hybrid_tools.training.mixture import load_balancing_loss, mix_experts, route

NUM_EXPERTS, HIDDEN = 5, 12


def experts(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(5)]


@pytest.mark.parametrize("per_token", [1, 2, 5], ids=lambda k: f"top{k}")
@pytest.mark.parametrize("num_tokens", [1, 2, 33], ids=lambda n: f"T{n}")
def test_outputs_and_gradients_are_those_of_a_loop_over_tokens(num_tokens, per_token):
    x = torch.randn(num_tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
    router = torch.randn(NUM_EXPERTS, HIDDEN, dtype=torch.float64, requires_grad=True)
    weights = experts()
    leaves = [x, router, *weights]
    routing = route(x, router, per_token)
    fast = mix_experts(x, routing, NUM_EXPERTS, lambda idx, rows: (rows @ weights[idx]).tanh())
    rows = []
    for token in x:
        shares = (router @ token).float().softmax(0)
        best = shares.topk(per_token)
        rows.append(
            sum(
                (share / best.values.sum()).double() * (token @ weights[idx]).tanh()
                for share, idx in zip(best.values, best.indices.tolist(), strict=True)
            )
        )
    slow = torch.stack(rows)
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-6)  # the router works in float32
    towards = torch.randn_like(slow)
    for found, expected in zip(
        torch.autograd.grad((fast * towards).sum(), leaves, allow_unused=True),
        torch.autograd.grad((slow * towards).sum(), leaves, allow_unused=True),
        strict=True,
    ):
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero if found is None else found.sum() if expected is None else found,
            zero.to(torch.float64)
            if expected is None and found is not None
            else zero
            if expected is None
            else expected,
            atol=1e-5,
            rtol=1e-5,
        )


def test_an_expert_that_nobody_chose_sees_no_rows():
    router = torch.zeros(3, HIDDEN)
    router[0] += 1
    router[1] += 0.5
    seen = {}

    def one(idx, rows):
        seen[idx] = len(rows)
        return rows

    x = torch.ones(4, HIDDEN)
    assert torch.allclose(mix_experts(x, route(x, router, 2), 3, one), x)
    assert seen == {0: 4, 1: 4, 2: 0}


@pytest.mark.parametrize("per_token", [1, 2])
def test_balancing_loss_is_that_of_transformers(per_token):
    generator = torch.Generator().manual_seed(1)
    layers = [
        route(torch.randn(40, HIDDEN, generator=generator), torch.randn(4, HIDDEN, generator=generator), per_token)
        for _ in range(3)
    ]
    theirs = load_balancing_loss_func(tuple(each.logits for each in layers), 4, per_token)
    torch.testing.assert_close(load_balancing_loss(layers, 4), theirs)


def test_even_routing_is_the_least_loss():
    even = torch.eye(4).repeat(8, 1) * 9
    uneven = torch.zeros(32, 4)
    uneven[:, 0] = 9
    losses = [load_balancing_loss([route(each, torch.eye(4), 1)], 4).item() for each in (even, uneven)]
    assert losses[0] == pytest.approx(1.0, abs=0.01)
    assert losses[1] == pytest.approx(4.0, abs=0.1)
