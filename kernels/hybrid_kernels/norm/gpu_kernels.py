"""The GPU's kernel behind gpu.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_kernel(x, weight, bias, y, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, IS_RMS: tl.constexpr):
    """x, y: float32 [T, WIDTH]; a program a row, which it holds whole."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    value = tl.load(x + row + column, mask, 0.0)
    scale = tl.load(weight + column, mask, 0.0)
    if IS_RMS:
        result = value * tl.rsqrt(tl.sum(value * value, axis=0) / WIDTH + eps) * scale
    else:
        centred = tl.where(mask, value - tl.sum(value, axis=0) / WIDTH, 0.0)
        spread = tl.rsqrt(tl.sum(centred * centred, axis=0) / WIDTH + eps)
        result = centred * spread * scale + tl.load(bias + column, mask, 0.0)
    tl.store(y + row + column, result, mask)
