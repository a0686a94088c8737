"""Expert routing against a plain sort in numpy."""

import numpy as np
import pytest
import torch

from hybrid_kernels.routing.op import route

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
