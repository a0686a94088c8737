"""What GPU kernels do with packed rows: products with vectors, and the weights of a tile.

q4 rows are read as the words they are: nibble i of a group's words is a plane of neighbouring columns, and
0x6400 | nibble is the float16 1024 + nibble, which one subtraction makes a level (the trick of Marlin and of GemLite).
Products go through the tensor cores even for one vector, since they would be idle anyway. Vectors are rounded to
float16 for quantised rows; f32 and bf16 rows meet them in float32. bf16 is read as the upper half of a float32, because
Triton's interpreter computes wrongly with it. How many instructions a weight takes, tests/kernels/gpu bounds.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def levels(words, nibble):
    """words: int32; nibble: which of the eight -> float16, -8 to 7."""
    bits = ((words >> (4 * nibble)) & 0xF) | 0x6400
    return bits.to(tl.int16).to(tl.float16, bitcast=True) - 1032.0


@triton.jit
def q4_column(word, nibble, GROUP: tl.constexpr):
    """The column that a nibble of a row's word holds (row_format.py)."""
    group_words: tl.constexpr = GROUP // 8
    return (word // group_words) * GROUP + nibble * group_words + word % group_words


@triton.jit
def row_products(
    x,
    x_stride,
    values,
    scales,
    value_start,
    scale_start,
    in_rows,
    vector,
    in_vectors,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows that start at value_start [R] in values (their own type) and scale_start in scales, times vectors [V] of x.

    x: float32, x_stride from vector to vector -> float32 [R, V], summed in a fixed order.
    """
    total = tl.zeros((value_start.shape[0], vector.shape[0]), tl.float32)
    vector_start = vector.to(tl.int64) * x_stride
    for first in range(0, COLUMNS, CHUNK):
        if KIND == "q4":
            word = first // 8 + tl.arange(0, CHUNK // 8)
            is_word = word < tl.cdiv(COLUMNS, GROUP) * (GROUP // 8)
            mask = in_rows[:, None] & is_word[None, :]
            words = tl.load(values + value_start[:, None] + word[None, :], mask, 0)
            scale = tl.load(scales + scale_start[:, None] + (word // (GROUP // 8))[None, :], mask, 0.0)
            for nibble in tl.static_range(8):
                column = q4_column(word, nibble, GROUP)
                in_x = (column < COLUMNS)[:, None] & in_vectors[None, :]
                part = tl.load(x + column[:, None] + vector_start[None, :], in_x, 0.0)
                total += tl.dot(levels(words, nibble) * scale, part.to(tl.float16))
        else:
            column = first + tl.arange(0, CHUNK)
            is_column = column < COLUMNS
            mask = in_rows[:, None] & is_column[None, :]
            weights = tl.load(values + value_start[:, None] + column[None, :], mask, 0)
            part = tl.load(x + column[:, None] + vector_start[None, :], is_column[:, None] & in_vectors[None, :], 0.0)
            if KIND == "q8":
                scale = tl.load(scales + scale_start[:, None] + (column // GROUP)[None, :], mask, 0.0)
                total += tl.dot(weights.to(tl.float16) * scale, part.to(tl.float16))
            else:
                total += tl.dot(as_float32(weights, KIND), part, input_precision="ieee")
    return total


@triton.jit
def as_float32(weights, KIND: tl.constexpr):
    """Values of f32 or bf16 rows, as they were loaded, to float32."""
    if KIND == "bf16":
        weights = (weights.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return weights


@triton.jit
def tile_columns(first, CHUNK: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr):
    """int32 [CHUNK]: the columns of a tile, in the order in which `tile` has them."""
    place = tl.arange(0, CHUNK)
    return q4_column(first // 8 + place // 8, place % 8, GROUP) if KIND == "q4" else first + place


@triton.jit
def tile(
    values,
    scales,
    value_start,
    scale_start,
    in_rows,
    first,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Weights of rows [R] in CHUNK columns from first on -> [R, CHUNK], float16 of quantised rows, else float32."""
    if KIND == "q4":
        word = first // 8 + tl.arange(0, CHUNK // 8)
        mask = in_rows[:, None] & (word < tl.cdiv(COLUMNS, GROUP) * (GROUP // 8))[None, :]
        words = tl.load(values + value_start[:, None] + word[None, :], mask, 0)
        scale = tl.load(scales + scale_start[:, None] + (word // (GROUP // 8))[None, :], mask, 0.0)
        planes = levels(words[:, :, None], tl.arange(0, 8)[None, None, :]) * scale[:, :, None]  # [R, CHUNK / 8, 8]
        weights = tl.reshape(planes, (value_start.shape[0], CHUNK))
    else:
        column = first + tl.arange(0, CHUNK)
        mask = in_rows[:, None] & (column < COLUMNS)[None, :]
        weights = tl.load(values + value_start[:, None] + column[None, :], mask, 0)
        if KIND == "q8":
            scale = tl.load(scales + scale_start[:, None] + (column // GROUP)[None, :], mask, 0.0)
            weights = weights.to(tl.float16) * scale
        else:
            weights = as_float32(weights, KIND)
    return weights
