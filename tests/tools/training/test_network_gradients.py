"""Gradients of the network, each activation, dense and mixture: those of the suite's independent oracle."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from hybrid_tools.training.initial import random_weights
from hybrid_tools.training.network import forward
from hybrid_tools.training.published import published_name
from hybrid_tools.training.recipe import Shape, activation_of

from ...hybrid_runtime.model.oracles import Oracle, dense_ffn, drelu, glu, relu_glu  # noqa: TID252  # as its siblings

VOCABULARY, HEADS, KV_HEADS, THRESHOLD, THETA = 40, 4, 2, 0.05, 500.0


def swiglu(gate, up):
    return gate / (1 + (-gate).exp()) * up


def fatrelu(gate, up):
    return torch.where(gate > THRESHOLD, gate, 0.0) * up


ACTS = {"swiglu": swiglu, "relu": relu_glu, "drelu": drelu, "fatrelu": fatrelu}


def mixture_ffn(weights, act):
    """Two of all experts a token, without anything in place: autograd follows."""

    def ffn(layer, _, residual, x):
        moe, rows = f"{layer}.block_sparse_moe", []
        for row in x:
            best = (weights[f"{moe}.gate.weight"] @ row).softmax(-1).topk(2)
            shares = best.values / best.values.sum()
            outputs = [
                glu(weights, f"{moe}.experts.{expert}", row[None], act, ("w1", "w3", "w2"))[0]
                for expert in best.indices.tolist()
            ]
            rows.append(shares[0] * outputs[0] + shares[1] * outputs[1])
        return torch.stack(rows)

    return ffn


@pytest.mark.parametrize("num_experts", [0, 3], ids=["dense", "mixture"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("activation", ACTS)
def test_gradients_of_the_loss_are_the_oracles(activation, tied, num_experts):
    shape = Shape(
        hidden_size=24,
        intermediate_size=17,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_experts=num_experts,
        rope_theta=THETA,
        tie_word_embeddings=tied,
    )
    config = shape.config(activation_of(activation, THRESHOLD if activation == "fatrelu" else 0.0), VOCABULARY, 1, 2)
    values = {name: weight * (10 if weight.ndim > 1 else 1) for name, weight in random_weights(config, 4).items()}
    tokens = torch.randint(VOCABULARY, (14,), generator=torch.Generator().manual_seed(2))
    ours = {name: weight.clone().requires_grad_() for name, weight in values.items()}
    found = forward(config, ours, tokens[None, :-1]).logits[0]
    functional.cross_entropy(found, tokens[1:]).backward()
    theirs = {published_name(name): weight.clone().requires_grad_() for name, weight in values.items()}
    ffn = mixture_ffn(theirs, ACTS[activation]) if num_experts else dense_ffn(theirs, ACTS[activation])
    expected = Oracle(theirs, ffn, HEADS, KV_HEADS, num_layers=2, theta=THETA).logits(tokens[:-1])
    assert (found - expected).abs().max() <= 1e-4
    functional.cross_entropy(expected, tokens[1:]).backward()
    for name, weight in ours.items():
        gradient = theirs[published_name(name)].grad
        if gradient is None:  # an expert that nobody chose
            assert num_experts
            assert not weight.grad.any(), name
            continue
        assert gradient.abs().max() > 1e-6, name  # else equality would say little
        torch.testing.assert_close(weight.grad, gradient, atol=1e-5, rtol=1e-3)
