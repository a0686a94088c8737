"""RMSNorm and LayerNorm against torch's own, and the compiled ones against those."""

import pytest
import torch
from torch.nn import functional

from hybrid_kernels.native import input_layout
from hybrid_kernels.norm.op import layer_norm, rms_norm
from hybrid_kernels.packed_matrix import PackedMatrix
from hybrid_kernels.quantization.reference import quantize_rows
from hybrid_kernels.quantization.row_format import RowFormat

from .kernel_calls import Norm, project

SHAPES = {"H1": (1,), "T1-H1": (1, 1), "T3-H333": (3, 333), "T2-N5-H64": (2, 5, 64), "T0-H8": (0, 8)}
# Sums of H float32 terms in another order, then a few roundings: about sqrt(H) * 6e-8, with a margin of 5.
CLOSE = {"rtol": 5e-6, "atol": 5e-6}

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@shapes
@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.1])
@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
def test_rms_norm_is_torchs(shape, eps, size):
    x, weight = torch.randn(shape) * size, torch.randn(shape[-1])
    torch.testing.assert_close(rms_norm(x, weight, eps), functional.rms_norm(x, shape[-1:], weight, eps), **CLOSE)


@shapes
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_layer_norm_is_torchs(shape, eps):
    x, weight, bias = torch.randn(shape) + 1, torch.randn(shape[-1]), torch.randn(shape[-1])
    expected = functional.layer_norm(x, shape[-1:], weight, bias, eps)
    torch.testing.assert_close(layer_norm(x, weight, bias, eps), expected, **CLOSE)


def test_a_constant_vector_has_no_variance():
    x = torch.full((2, 64), 3.0)
    assert torch.equal(layer_norm(x, torch.ones(64), torch.full((64,), 0.5), 1e-5), torch.full((2, 64), 0.5))


def test_zeros_stay_zeros():
    assert torch.equal(rms_norm(torch.zeros(2, 64), torch.ones(64), 1e-6), torch.zeros(2, 64))


def test_another_width_is_refused():
    x = torch.ones(2, 64)
    with pytest.raises(ValueError, match=r"a norm of width \(63,\) on x of shape \(2, 64\)"):
        rms_norm(x, torch.ones(63), 1e-6)
    with pytest.raises(ValueError, match=r"a norm of width \(1,\) on x of shape \(2, 64\)"):
        layer_norm(x, torch.ones(1), torch.ones(64), 1e-6)
    with pytest.raises(ValueError, match=r"a norm of width \(65,\) on x of shape \(2, 64\)"):
        layer_norm(x, torch.ones(64), torch.ones(65), 1e-6)
    with pytest.raises(ValueError, match=r"a norm of width \(2, 64\) on x"):
        rms_norm(x, torch.ones(2, 64), 1e-6)


@pytest.mark.parametrize("width", [1, 7, 64, 333])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
def test_compiled_norms_are_the_references(width, eps, size, team):
    """What `project` does to its vector, seen through a matrix that changes nothing."""
    f32 = RowFormat("f32")
    same = PackedMatrix(quantize_rows(torch.eye(width), f32), width, f32)
    x, weight, bias = torch.randn(width) * size + size, torch.randn(width), torch.randn(width)
    found = project(team, x, same, norm=Norm(input_layout.RMS_NORM, weight, eps=eps))
    torch.testing.assert_close(found, rms_norm(x, weight, eps), **CLOSE)
    found = project(team, x, same, norm=Norm(input_layout.LAYER_NORM, weight, bias, eps))
    torch.testing.assert_close(found, layer_norm(x, weight, bias, eps), **CLOSE)


@pytest.mark.parametrize("kind", [input_layout.RMS_NORM, input_layout.LAYER_NORM])
def test_compiled_norms_of_zeros_are_finite(kind, team):
    f32, bias = RowFormat("f32"), torch.randn(64)
    same = PackedMatrix(quantize_rows(torch.eye(64), f32), 64, f32)
    found = project(team, torch.zeros(64), same, norm=Norm(kind, torch.ones(64), bias))
    assert torch.equal(found, bias if kind == input_layout.LAYER_NORM else torch.zeros(64))
