"""Eight rows of weights side by side, for products with many vectors: Numba intrinsics that emit LLVM vector code.

    build_panel      eight packed rows -> a panel
    requantize       32 neurons' down rows (as float32) of eight columns -> a panel, with a scale a column
    multiply_tile    a panel times four int8 vectors

A panel holds, for every four places of the rows' packed order, four bytes of each of eight rows (32 bytes), and for
every group eight float32 scales. One load of it meets four bytes of a vector in every lane pair, so that the lanes of
a sum are rows and nothing is summed across lanes. A panel is built once and used for all vectors of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hybrid_kernels.native.instruction_sets import instruction_set
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.simd.emit import (
    BYTES,
    FLOAT,
    FLOATS,
    HALF,
    I32,
    I64,
    INTS,
    LANES,
    SHORTS,
    as_pointers,
    call,
    constant,
    every,
    fma,
    load,
    shuffle,
    splat,
    store,
    times,
)
from hybrid_kernels.simd.int8_rows import nibbles_of, switch_formats
from hybrid_kernels.simd.multiply_add import dot_signed, dot_unsigned

TILE = 4  # vectors that a panel meets at once
BLOCK = 32  # places whose products are summed in 16 bits


def _emit_build(builder: ir.IRBuilder, row_format: RowFormat, args: Sequence[ir.Value]) -> None:
    addresses, panel, panel_scales = as_pointers(builder, args[:3])
    scales_offset, num_groups = args[3], args[4]
    rows = as_pointers(builder, [load(builder, addresses, 8 * lane, I64) for lane in range(LANES)])
    blocks = row_format.group // BLOCK
    with cgutils.for_range(builder, num_groups) as loop:
        value_offset = times(builder, loop.index, row_format.value_bytes(row_format.group))
        scale_offset = builder.add(scales_offset, times(builder, loop.index, 2))
        for lane, row in enumerate(rows):
            scale = builder.fpext(load(builder, row, scale_offset, HALF), FLOAT)
            store(builder, scale, panel_scales, builder.add(times(builder, loop.index, 32), constant(4 * lane)))
        for block in range(blocks):
            vectors = []
            for row in rows:
                values = builder.gep(row, [value_offset])
                if row_format.kind == "q4":
                    vectors.append(nibbles_of(builder, values, row_format, block))
                else:
                    vectors.append(load(builder, values, BLOCK * block, BYTES))
            columns = _transpose(builder, [builder.bitcast(vector, INTS) for vector in vectors])
            place = builder.mul(builder.add(times(builder, loop.index, blocks), constant(block)), constant(8 * 32))
            for quad, column in enumerate(columns):
                store(builder, column, panel, builder.add(place, constant(32 * quad)))


def _transpose(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """Eight vectors of eight lanes, turned."""
    pairs = []
    for idx in range(0, 8, 2):
        a, b = rows[idx], rows[idx + 1]
        pairs.append(shuffle(builder, a, b, [0, 8, 1, 9, 4, 12, 5, 13]))
        pairs.append(shuffle(builder, a, b, [2, 10, 3, 11, 6, 14, 7, 15]))
    fours = []
    for idx in (0, 4):
        for part in range(2):
            a, b = pairs[idx + part], pairs[idx + 2 + part]
            fours.append(shuffle(builder, a, b, [0, 1, 8, 9, 4, 5, 12, 13]))
            fours.append(shuffle(builder, a, b, [2, 3, 10, 11, 6, 7, 14, 15]))
    low = [shuffle(builder, fours[idx], fours[4 + idx], [0, 1, 2, 3, 8, 9, 10, 11]) for idx in range(4)]
    high = [shuffle(builder, fours[idx], fours[4 + idx], [4, 5, 6, 7, 12, 13, 14, 15]) for idx in range(4)]
    return low + high


def _emit_requantize(builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    """Rows of float32, args[1] bytes apart; eight columns of BLOCK of them."""
    source, panel, panel_scales = as_pointers(builder, [args[0], args[2], args[3]])
    rows = [builder.gep(source, [times(builder, args[1], row)]) for row in range(BLOCK)]
    lanes = [load(builder, row, 0, FLOATS) for row in rows]
    peak = call(builder, "llvm.fabs.v8f32", FLOATS, [lanes[0]])
    for lane in lanes[1:]:
        size = call(builder, "llvm.fabs.v8f32", FLOATS, [lane])
        peak = call(builder, "llvm.maxnum.v8f32", FLOATS, [peak, size])
    is_zero = builder.fcmp_ordered("==", peak, every(FLOATS, 0.0))
    inverse = builder.select(is_zero, every(FLOATS, 0.0), builder.fdiv(every(FLOATS, 127.0), peak))
    store(builder, builder.fdiv(peak, every(FLOATS, 127.0)), panel_scales, 0)
    for quad in range(BLOCK // 4):
        word = None
        for byte in range(4):
            value = builder.fmul(load(builder, rows[4 * quad + byte], 0, FLOATS), inverse)
            whole = builder.fptosi(call(builder, "llvm.rint.v8f32", FLOATS, [value]), INTS)
            shifted = builder.shl(builder.and_(whole, every(INTS, 255)), every(INTS, 8 * byte))
            word = shifted if word is None else builder.or_(word, shifted)
        store(builder, word, panel, 32 * quad)


def _emit_tile(builder: ir.IRBuilder, args: Sequence[ir.Value], *, signed: bool) -> None:
    panel, panel_scales, levels, scales, starts, outputs = as_pointers(builder, args[:6])
    num_groups, blocks_per_group, adds = args[6], args[7], args[8]

    def vector(table: ir.Value, idx: int) -> ir.Value:
        return builder.inttoptr(load(builder, table, 8 * idx, I64), ir.IntType(8).as_pointer())

    x = [vector(levels, idx) for idx in range(TILE)]
    x_scales = [vector(scales, idx) for idx in range(TILE)]
    x_starts = [vector(starts, idx) for idx in range(TILE)]
    targets = [vector(outputs, idx) for idx in range(TILE)]
    sums = [cgutils.alloca_once(builder, FLOATS) for _ in range(TILE)]
    wanted = builder.icmp_signed("!=", adds, constant(0))
    for total, target in zip(sums, targets, strict=True):
        builder.store(every(FLOATS, 0.0), total)
        with builder.if_then(wanted):
            builder.store(load(builder, target, 0, FLOATS), total)
    whole = [cgutils.alloca_once(builder, INTS) for _ in range(TILE)]
    with cgutils.for_range(builder, num_groups) as loop:
        for total in whole:
            builder.store(every(INTS, 0), total)
        with cgutils.for_range(builder, blocks_per_group) as inner:
            block = builder.add(builder.mul(loop.index, blocks_per_group), inner.index)
            block_panel = builder.gep(panel, [times(builder, block, 8 * 32)])
            block_x = [builder.gep(vector_x, [times(builder, block, BLOCK)]) for vector_x in x]
            start = [load(builder, begin, times(builder, block, 4), I32) for begin in x_starts]
            before = [builder.load(total) for total in whole]
            after = (
                _block_signed(builder, block_panel, block_x, before)
                if signed
                else _block_unsigned(builder, block_panel, block_x, start, before)
            )
            for total, value in zip(whole, after, strict=True):
                builder.store(value, total)
        w_scales = load(builder, panel_scales, times(builder, loop.index, 32), FLOATS)
        for idx in range(TILE):
            scale = splat(builder, load(builder, x_scales[idx], times(builder, loop.index, 4), FLOAT))
            dot = builder.sitofp(builder.load(whole[idx]), FLOATS)
            builder.store(fma(builder, dot, builder.fmul(w_scales, scale), builder.load(sums[idx])), sums[idx])
    for total, target in zip(sums, targets, strict=True):
        store(builder, builder.load(total), target, 0)


def sums_in_shorts() -> bool:
    """Whether products of nibbles and bytes are summed in 16 bits, for which `starts` are made."""
    return instruction_set() == "avx2"


def _block_unsigned(
    builder: ir.IRBuilder, panel: ir.Value, x: list[ir.Value], start: list[ir.Value], before: list[ir.Value]
) -> list[ir.Value]:
    """Nibbles: sums start at minus 8 times the vector's sum, so that they are those of nibble - 8.

    In 16 bits a lane sees half of a block's products: minus 4 times, and never beyond 15 * 127 * 16.
    """
    if not sums_in_shorts():
        totals = [builder.add(total, splat(builder, begin)) for total, begin in zip(before, start, strict=True)]
        for quad in range(8):
            w = load(builder, panel, 32 * quad, BYTES)
            for idx in range(TILE):
                four = builder.bitcast(splat(builder, load(builder, x[idx], 4 * quad, I32)), BYTES)
                totals[idx] = dot_unsigned(builder, w, four, totals[idx])
        return totals
    shorts = [builder.bitcast(splat(builder, begin), SHORTS) for begin in start]
    for quad in range(8):
        w = load(builder, panel, 32 * quad, BYTES)
        for idx in range(TILE):
            four = builder.bitcast(splat(builder, load(builder, x[idx], 4 * quad, I32)), BYTES)
            shorts[idx] = builder.add(shorts[idx], call(builder, "llvm.x86.avx2.pmadd.ub.sw", SHORTS, [w, four]))
    ones = every(SHORTS, 1)
    return [
        builder.add(total, call(builder, "llvm.x86.avx2.pmadd.wd", INTS, [short, ones]))
        for total, short in zip(before, shorts, strict=True)
    ]


def _block_signed(builder: ir.IRBuilder, panel: ir.Value, x: list[ir.Value], before: list[ir.Value]) -> list[ir.Value]:
    totals = list(before)
    for quad in range(8):
        w = load(builder, panel, 32 * quad, BYTES)
        for idx in range(TILE):
            four = builder.bitcast(splat(builder, load(builder, x[idx], 4 * quad, I32)), BYTES)
            totals[idx] = dot_signed(builder, w, four, totals[idx])
    return totals


@intrinsic
def build_panel(typing_context, code, rows, panel, scales, scales_offset, num_groups):  # type: ignore[no-untyped-def]
    """Eight packed q4 or q8 rows as a panel. All arguments int64.

    rows: address of eight addresses; panel: of uint8 [num_groups * group / 4, 32]; scales: of float32 [num_groups, 8];
    scales_offset: bytes from a row to its scales.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        switch_formats(builder, args[0], _emit_build, args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@intrinsic
def requantize(typing_context, source, stride, panel, scales):  # type: ignore[no-untyped-def]
    """Eight columns of BLOCK float32 rows, stride bytes apart, as a block of a panel of signed bytes."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _emit_requantize(builder, args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def _tile_intrinsic(*, signed: bool):  # type: ignore[no-untyped-def]
    @intrinsic
    def multiply(  # type: ignore[no-untyped-def]
        typing_context, panel, panel_scales, levels, scales, starts, outputs, num_groups, blocks_per_group, adds
    ):
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            _emit_tile(builder, args, signed=signed)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return multiply


multiply_nibble_tile = _tile_intrinsic(signed=False)
"""A panel of q4 rows times TILE vectors. All arguments int64.

levels, scales, starts, outputs: addresses of TILE addresses: of the vector's int8 in packed order, its float32 scales
by group, its starts (int32 by block), and eight float32 that are written, or added to where adds is not 0.
"""
multiply_byte_tile = _tile_intrinsic(signed=True)
"""The same for a panel of signed bytes; starts are not read."""
