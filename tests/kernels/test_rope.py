"""Rotary positions against the rotation of complex numbers."""

import pytest
import torch

from hybrid_kernels.rope.op import apply_rope

SHAPES = {"T1-N1-D2": (1, 1, 2), "T5-N3-D6": (5, 3, 6), "T33-N4-D128": (33, 4, 128), "T0-N2-D4": (0, 2, 4)}


def frequencies(head_dim: int, theta: float = 10000.0) -> torch.Tensor:
    return theta ** (-torch.arange(0, head_dim, 2) / head_dim)


def rotated(x, positions, inverse_frequencies, magnitude) -> torch.Tensor:
    """(x[d] + i x[d + D/2]) * magnitude * exp(i * position * frequency), in float64."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    angles = (positions.float()[:, None] * inverse_frequencies).double()  # float32 angles are Hugging Face's
    turned = pairs * torch.polar(torch.full_like(angles, magnitude), angles)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("first_position", [0, 1, 4095, 1_000_000])
@pytest.mark.parametrize("magnitude", [1.0, 1.3])
def test_it_turns_pairs_half_a_head_apart(shape, first_position, magnitude):
    x, positions = torch.randn(shape), torch.arange(first_position, first_position + shape[0])
    found = apply_rope(x, positions, frequencies(shape[-1]), magnitude)
    expected = rotated(x, positions, frequencies(shape[-1]), magnitude)
    # float32 cos and sin of the same float32 angle are good to an ulp (6e-8), and values reach about 5
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


def test_position_zero_changes_nothing():
    x = torch.randn(1, 2, 8)
    assert torch.equal(apply_rope(x, torch.zeros(1, dtype=torch.int64), frequencies(8)), x)


def test_scores_depend_on_the_distance_alone():
    query, key = torch.randn(2, 1, 1, 64)

    def score(query_position: int, key_position: int) -> torch.Tensor:
        turned = [
            apply_rope(x, torch.tensor([position]), frequencies(64))
            for x, position in ((query, query_position), (key, key_position))
        ]
        return (turned[0] * turned[1]).sum()

    # angles up to 107 rad carry float32 errors of up to 4e-6 rad, times products that add up to about 64
    torch.testing.assert_close(score(107, 100), score(7, 0), rtol=0, atol=3e-4)
    assert abs(score(9, 0) - score(7, 0)) > 1e-2


@pytest.mark.parametrize(
    ("x", "positions", "inverse_frequencies"),
    [
        ((3, 8), (3,), (4,)),
        ((3, 1, 8), (2,), (4,)),
        ((3, 1, 8), (3, 1), (4,)),
        ((3, 1, 8), (3,), (8,)),
        ((3, 1, 9), (3,), (4,)),
        ((3, 1, 8), (3,), (4, 1)),
    ],
    ids=["no heads", "positions short", "positions 2-D", "frequencies of D", "odd D", "frequencies 2-D"],
)
def test_shapes_that_do_not_fit_are_refused(x, positions, inverse_frequencies):
    with pytest.raises(ValueError, match=r"do not fit \[T, heads, D\], \[T\], \[D / 2\]"):
        apply_rope(torch.ones(x), torch.ones(positions, dtype=torch.int64), torch.ones(inverse_frequencies))
