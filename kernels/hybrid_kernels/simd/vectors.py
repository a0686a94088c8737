"""Loops over float vectors at plain addresses, which LLVM turns into vector code by itself."""

from __future__ import annotations

import math

import numba
import numpy as np

from hybrid_kernels.native.memory_access import get_f32, put_f32

_SUMS = {"reassoc", "contract", "nsz"}


@numba.njit(error_model="numpy", fastmath=_SUMS)
def sum_squares(x: int, size: int) -> float:
    """Sum of the squares of float32 [size]."""
    total = np.float32(0.0)
    for idx in range(size):
        value = get_f32(x, idx)
        total += value * value
    return total


@numba.njit(error_model="numpy", fastmath=_SUMS)
def sum_values(x: int, size: int) -> float:
    """Sum of float32 [size]."""
    total = np.float32(0.0)
    for idx in range(size):
        total += get_f32(x, idx)
    return total


@numba.njit(error_model="numpy")
def copy_values(x: int, output: int, size: int) -> None:
    """Copy float32 [size]."""
    for idx in range(size):
        put_f32(output, idx, get_f32(x, idx))


@numba.njit(error_model="numpy")
def fill_zeros(output: int, start: int, stop: int) -> None:
    """Zero the float32 values start ... stop - 1."""
    for idx in range(start, stop):
        put_f32(output, idx, np.float32(0.0))


@numba.njit(error_model="numpy")
def add_values(x: int, output: int, size: int) -> None:
    """output += x, float32 [size]."""
    for idx in range(size):
        put_f32(output, idx, get_f32(output, idx) + get_f32(x, idx))


@numba.njit(error_model="numpy")
def add_scaled(x: int, output: int, size: int, factor: float) -> None:
    """output += factor * x, float32 [size]."""
    for idx in range(size):
        put_f32(output, idx, get_f32(output, idx) + np.float32(factor) * get_f32(x, idx))


@numba.njit(error_model="numpy", fastmath=_SUMS)
def dot(x: int, y: int, size: int) -> float:
    """Sum of x * y, float32 [size]."""
    total = np.float32(0.0)
    for idx in range(size):
        total += get_f32(x, idx) * get_f32(y, idx)
    return total


@numba.njit(error_model="numpy")
def rms_norm(x: int, weight: int, output: int, size: int, eps: float) -> None:
    """norm/reference.py's rms_norm of one vector."""
    factor = np.float32(1.0) / np.float32(math.sqrt(sum_squares(x, size) / np.float32(size) + np.float32(eps)))
    for idx in range(size):
        put_f32(output, idx, get_f32(x, idx) * factor * get_f32(weight, idx))


@numba.njit(error_model="numpy")
def layer_norm(x: int, weight: int, bias: int, output: int, size: int, eps: float) -> None:
    """norm/reference.py's layer_norm of one vector."""
    mean = np.float32(sum_values(x, size) / np.float32(size))
    for idx in range(size):
        put_f32(output, idx, get_f32(x, idx) - mean)
    factor = np.float32(1.0) / np.float32(math.sqrt(sum_squares(output, size) / np.float32(size) + np.float32(eps)))
    for idx in range(size):
        put_f32(output, idx, get_f32(output, idx) * factor * get_f32(weight, idx) + get_f32(bias, idx))
