"""Expert routing against a plain sort in numpy, and the kernel of one token against the reference."""

import numpy as np
import pytest
import torch

from hybrid_kernels.native.arguments import words
from hybrid_kernels.native.kernel_names import kernel
from hybrid_kernels.routing import layout
from hybrid_kernels.routing.op import route
from hybrid_kernels.routing.reference import ROUTER_SCORES
from hybrid_kernels.team import Operation

SHAPES = {
    "T1-E1-k1": (1, 1, 1),
    "T7-E8-k2": (7, 8, 2),
    "T3-E33-k5": (3, 33, 5),
    "T4-E8-k8": (4, 8, 8),
    "T0-E4-k2": (0, 4, 2),
}


def routed(logits: np.ndarray, k: int, score: str, *, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
    experts = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    chosen = np.take_along_axis(logits, experts, axis=1)
    if score == "softmax":
        weights = np.exp(chosen) / np.exp(logits).sum(axis=1, keepdims=True)
    elif score == "topk_sigmoid":
        weights = 1 / (1 + np.exp(-chosen))
    else:
        weights = np.exp(chosen) / np.exp(chosen).sum(axis=1, keepdims=True)
    return experts, weights / weights.sum(axis=1, keepdims=True) if normalize else weights


@pytest.mark.parametrize(("num_tokens", "num_experts", "k"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("score", ["softmax", "topk_sigmoid", "topk_softmax"])
@pytest.mark.parametrize("normalize", [True, False])
def test_route_is_the_formula(num_tokens, num_experts, k, score, normalize):
    logits = torch.randn(num_tokens, num_experts) * 3
    experts, weights = route(logits, k, score, normalize=normalize)
    expected_experts, expected_weights = routed(logits.double().numpy(), k, score, normalize=normalize)
    assert experts.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert np.array_equal(experts.numpy(), expected_experts)
    # exp, a sum of at most 33 terms and a division, each good to about 6e-8 of its result
    np.testing.assert_allclose(weights.numpy(), expected_weights, rtol=2e-6)


@pytest.mark.parametrize("score", ["softmax", "topk_sigmoid", "topk_softmax"])
def test_large_logits_do_not_overflow(score):
    _, weights = route(torch.tensor([[1e4, -1e4, 9.9e3, 0.0]]), 2, score)
    assert weights.isfinite().all()
    assert weights.sum().item() == pytest.approx(1)


def test_normalising_changes_the_weights_of_a_softmax_over_all_experts():
    logits = torch.zeros(1, 4)
    assert route(logits, 2, "softmax", normalize=False)[1].tolist() == [[0.25, 0.25]]
    assert route(logits, 2, "softmax")[1].tolist() == [[0.5, 0.5]]


def test_an_unknown_score_is_refused():
    with pytest.raises(ValueError, match=r"router score 'sigmoid' is not one of softmax, topk_sigmoid, topk_softmax"):
        route(torch.zeros(1, 4), 2, "sigmoid")


@pytest.mark.parametrize(("shape", "k"), [((1, 4), 0), ((1, 4), 5), ((1, 4), -1), ((4,), 2), ((1, 1, 4), 2)])
def test_counts_that_no_logits_have_are_refused(shape, k):
    with pytest.raises(ValueError, match=rf"{k} experts per token from logits of shape \({shape[0]},"):
        route(torch.zeros(shape), k, "softmax")


def routed_by_the_kernel(team, logits, k, score, *, normalize):
    """logits: [E] -> experts [k], ascending, and their weights."""
    experts, weights = np.full(k, -1, dtype=np.int64), np.full(k, np.nan, dtype=np.float32)
    values = {
        layout.LOGITS: logits,
        layout.NUM_EXPERTS: len(logits),
        layout.NUM_CHOSEN: k,
        layout.SCORE: ROUTER_SCORES.index(score),
        layout.NORMALIZE: int(normalize),
        layout.CHOSEN: experts,
        layout.WEIGHTS: weights,
    }
    team.run(team.program([Operation(kernel("route"), "route", words(layout.NUM_WORDS, values))]))
    return experts, weights


@pytest.mark.parametrize(("num_tokens", "num_experts", "k"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("score", ROUTER_SCORES)
@pytest.mark.parametrize("normalize", [True, False])
def test_the_kernel_is_the_reference_in_the_order_of_experts(num_tokens, num_experts, k, score, normalize, team):
    logits = torch.randn(num_tokens, num_experts) * 3
    experts, weights = route(logits, k, score, normalize=normalize)
    for token in range(num_tokens):
        order = experts[token].argsort()
        found = routed_by_the_kernel(team, logits[token].clone(), k, score, normalize=normalize)
        assert np.array_equal(found[0], experts[token][order].numpy())
        # exp, a sum of at most 33 terms and a division, each good to about 6e-8 of its result
        np.testing.assert_allclose(found[1], weights[token][order].numpy(), rtol=2e-6)


@pytest.mark.parametrize("score", ROUTER_SCORES)
def test_among_equals_the_kernel_takes_the_first(score, team):
    """torch.topk leaves that open; the weights are the same whichever it takes."""
    logits = torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0, 2.0])
    experts, weights = routed_by_the_kernel(team, logits.clone(), 4, score, normalize=True)
    assert experts.tolist() == [1, 2, 3, 4]
    expected = route(logits[None], 4, score)[1][0]
    np.testing.assert_allclose(np.sort(weights), expected.sort().values.numpy(), rtol=2e-6)
    assert routed_by_the_kernel(team, torch.zeros(5), 2, score, normalize=True)[0].tolist() == [0, 1]


@pytest.mark.parametrize("score", ROUTER_SCORES)
def test_large_logits_do_not_overflow_the_kernel(score, team):
    experts, weights = routed_by_the_kernel(team, torch.tensor([1e4, -1e4, 9.9e3, 0.0]), 2, score, normalize=True)
    assert experts.tolist() == [0, 2]
    assert np.isfinite(weights).all()
    assert weights.sum() == pytest.approx(1)
