"""Packed q4 and q8 rows times factors, added up in SIMD registers: a Numba intrinsic that emits LLVM vector code.

    int8_add_rows     y += sum over up to 16 rows of factor * row

The down projection of a few neurons. A row's scale times its factor is rounded for each group of columns, to 8 bits
(q4) or 16 (q8) of the largest among the rows; then products of two rows at a time are summed in integers. A q4 row's
error is that of a vector rounded to int8 (about half a percent of the result's norm); q8's is negligible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hybrid_kernels.packed_order import MOST_ROWS
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.simd.emit import (
    BYTES,
    FLOAT,
    FLOATS,
    HALF,
    I8,
    I32,
    I64,
    INTS,
    LANES,
    LINE_BYTES,
    SHORTS,
    as_pointers,
    call,
    constant,
    every,
    fma,
    load,
    prefetch_line,
    shuffle,
    splat,
    store,
    times,
)
from hybrid_kernels.simd.int8_rows import switch_formats
from hybrid_kernels.simd.multiply_add import pair_madd, short_pair_madd

SCRATCH_BYTES = MOST_ROWS * 32 * 2  # factors as float32, then in pairs as integers, of LANES groups
_PAIRS = MOST_ROWS * 32  # where those pairs begin in the scratch; before them, once they are made:
_SCALES, _STARTS = 0, 32  # per group the factors' scale, and what sums of nibbles start at


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the loop over pairs of rows needs. value_offset: bytes from a row to the columns at hand."""

    addresses: ir.Value
    aheads: ir.Value
    num_pairs: ir.Value
    value_offset: ir.Value

    def values(self, builder: ir.IRBuilder, pair_idx: ir.Value, parity: int, byte: int, count: int) -> ir.Value:
        """That many bytes of a row of the pair."""
        place = builder.add(times(builder, pair_idx, 16), constant(8 * parity))
        row = builder.inttoptr(load(builder, self.addresses, place, I64), I8.as_pointer())
        offset = builder.add(self.value_offset, constant(byte))
        return load(builder, row, offset, ir.VectorType(I8, count))

    def prefetch(self, builder: ir.IRBuilder, pair_idx: ir.Value, byte: int) -> None:
        """A line of one of the rows to come: of each pair's two, in turn, as one passes over 32 bytes and the next."""
        offset = builder.add(self.value_offset, constant(byte))
        parity = builder.and_(builder.lshr(offset, constant(5)), constant(1))
        place = builder.add(times(builder, pair_idx, 16), times(builder, parity, 8))
        row = builder.inttoptr(load(builder, self.aheads, place, I64), I8.as_pointer())
        prefetch_line(builder, builder.gep(row, [builder.and_(offset, constant(-LINE_BYTES))]))


def _emit_add_rows(builder: ir.IRBuilder, row_format: RowFormat, args: Sequence[ir.Value]) -> None:
    num_groups = args[4]
    num_blocks = builder.udiv(num_groups, constant(LANES))
    with cgutils.for_range(builder, num_blocks) as loop:
        _add_block(builder, row_format, args, times(builder, loop.index, LANES), LANES)
    first_left = times(builder, num_blocks, LANES)
    with cgutils.for_range_slice(builder, first_left, num_groups, constant(1)) as (group_idx, _):
        _add_block(builder, row_format, args, group_idx, 1)


def _add_block(
    builder: ir.IRBuilder, row_format: RowFormat, args: Sequence[ir.Value], first: ir.Value, count: int
) -> None:
    """Groups first ... first + count - 1 of every row, count LANES or 1."""
    rows, factors, y, scratch, aheads = as_pointers(builder, [args[0], args[1], args[3], args[6], args[7]])
    num_pairs = args[2]
    _round_factors(builder, row_format, rows, factors, num_pairs, args[5], first, count, scratch, aheads)
    step = 2 if row_format.kind == "q4" and row_format.group == 32 and count == LANES else 1
    with cgutils.for_range(builder, constant(count // step)) as loop:
        lane = times(builder, loop.index, 4 * step)
        group_idx = builder.add(first, times(builder, loop.index, step))
        y_group = builder.gep(y, [times(builder, group_idx, 4 * row_format.group)])
        value_offset = times(builder, group_idx, row_format.value_bytes(row_format.group))
        own = builder.gep(scratch, [lane])
        group_rows = _Rows(rows, aheads, num_pairs, value_offset)
        if row_format.kind == "q8":
            _add_q8_group(builder, row_format, group_rows, own, y_group)
        elif row_format.group == 32 and step == 1:
            _add_narrow_group(builder, group_rows, own, y_group)
        else:
            for byte in range(0, row_format.group // 2 * step, 32):
                _add_wide_piece(builder, group_rows, own, y_group, byte, two_groups=step == 2)


def _round_factors(
    builder: ir.IRBuilder,
    row_format: RowFormat,
    rows: ir.Value,
    factors: ir.Value,
    num_pairs: ir.Value,
    scales_offset: ir.Value,
    first: ir.Value,
    count: int,
    scratch: ir.Value,
    aheads: ir.Value,
) -> None:
    """Write the pairs, scales and starts of a block of groups to the scratch."""
    pairs = builder.gep(scratch, [constant(_PAIRS)])
    most_level = 127.0 if row_format.kind == "q4" else 32767.0
    peak = cgutils.alloca_once_value(builder, every(FLOATS, 0.0))
    builder.store(every(FLOATS, 0.0), peak)
    with cgutils.for_range(builder, times(builder, num_pairs, 2)) as loop:
        row = builder.inttoptr(load(builder, rows, times(builder, loop.index, 8), I64), I8.as_pointer())
        offset = builder.add(scales_offset, times(builder, first, 2))
        scales = builder.gep(row, [offset])
        ahead = builder.inttoptr(load(builder, aheads, times(builder, loop.index, 8), I64), I8.as_pointer())
        prefetch_line(builder, builder.gep(ahead, [offset]))
        if count == LANES:
            lanes = builder.fpext(load(builder, scales, 0, ir.VectorType(HALF, LANES)), FLOATS)
        else:
            lanes = splat(builder, builder.fpext(load(builder, scales, 0, HALF), FLOAT))
        product = builder.fmul(lanes, splat(builder, load(builder, factors, times(builder, loop.index, 4), FLOAT)))
        store(builder, product, scratch, times(builder, loop.index, 32))
        size = call(builder, "llvm.fabs.v8f32", FLOATS, [product])
        builder.store(call(builder, "llvm.maxnum.v8f32", FLOATS, [size, builder.load(peak)]), peak)
    highest = builder.load(peak)
    is_zero = builder.fcmp_ordered("==", highest, every(FLOATS, 0.0))
    inverse = builder.fdiv(every(FLOATS, most_level), highest)
    inverse = builder.select(is_zero, every(FLOATS, 0.0), inverse)
    level_sum = cgutils.alloca_once_value(builder, every(INTS, 0))
    builder.store(every(INTS, 0), level_sum)
    with cgutils.for_range(builder, num_pairs) as loop:
        both = []
        for parity in range(2):
            place = builder.add(times(builder, loop.index, 64), constant(32 * parity))
            rounded = builder.fmul(load(builder, scratch, place, FLOATS), inverse)
            both.append(builder.fptosi(call(builder, "llvm.rint.v8f32", FLOATS, [rounded]), INTS))
        builder.store(builder.add(builder.load(level_sum), builder.add(*both)), level_sum)
        store(builder, _as_pair(builder, row_format, *both), pairs, times(builder, loop.index, 32))
    store(builder, builder.fdiv(highest, every(FLOATS, most_level)), scratch, _SCALES)
    start = builder.and_(builder.mul(builder.load(level_sum), every(INTS, -8)), every(INTS, 0xFFFF))
    store(builder, builder.or_(start, builder.shl(start, every(INTS, 16))), scratch, _STARTS)


def _as_pair(builder: ir.IRBuilder, row_format: RowFormat, first: ir.Value, second: ir.Value) -> ir.Value:
    """Factors of two rows in one int32: as int16 twice, or as int8 twice and those two again."""
    bits = 16 if row_format.kind == "q8" else 8
    mask = every(INTS, (1 << bits) - 1)
    both = builder.or_(builder.and_(first, mask), builder.shl(builder.and_(second, mask), every(INTS, bits)))
    return both if bits == 16 else builder.or_(both, builder.shl(both, every(INTS, 16)))


def _lanes_of(builder: ir.IRBuilder, own: ir.Value, offset: ir.Value | int, *, two_groups: bool) -> ir.Value:
    """An int32 of the group's in all lanes, or of two groups in half of the lanes each."""
    if not two_groups:
        return splat(builder, load(builder, own, offset, I32))
    return shuffle(builder, load(builder, own, offset, ir.VectorType(I32, 2)), None, [0] * 4 + [1] * 4)


def _add_wide_piece(
    builder: ir.IRBuilder, rows: _Rows, own: ir.Value, y_group: ir.Value, byte: int, *, two_groups: bool
) -> None:
    """32 bytes of every row: two groups of 32 columns, or a part of a larger group."""
    start = builder.bitcast(_lanes_of(builder, own, _STARTS, two_groups=two_groups), SHORTS)
    interleaved = {
        0: [lane for half in (0, 16) for i in range(8) for lane in (half + i, 32 + half + i)],
        8: [lane for half in (8, 24) for i in range(8) for lane in (half + i, 32 + half + i)],
    }
    totals = {(part, high): cgutils.alloca_once_value(builder, every(SHORTS, 0)) for part in (0, 8) for high in (0, 1)}
    for total in totals.values():
        builder.store(start, total)
    with cgutils.for_range(builder, rows.num_pairs) as loop:
        a, b = (rows.values(builder, loop.index, parity, byte, 32) for parity in range(2))
        rows.prefetch(builder, loop.index, byte)
        place = builder.add(times(builder, loop.index, 32), constant(_PAIRS))
        factors = builder.bitcast(_lanes_of(builder, own, place, two_groups=two_groups), BYTES)
        for part in (0, 8):
            both = shuffle(builder, a, b, interleaved[part])
            _add_nibbles(builder, both, factors, totals[part, 0], totals[part, 1])
    for (part, high), total in totals.items():
        whole = builder.load(total)
        for half in range(2):
            lanes = builder.sext(shuffle(builder, whole, None, range(8 * half, 8 * half + 8)), INTS)
            if two_groups:
                scale, place = load(builder, own, _SCALES + 4 * half, FLOAT), 32 * half + 16 * high + part
            else:
                scale, place = load(builder, own, _SCALES, FLOAT), 2 * byte + 32 * high + 16 * half + part
            _accumulate(builder, lanes, splat(builder, scale), y_group, place)


def _add_narrow_group(builder: ir.IRBuilder, rows: _Rows, own: ir.Value, y_group: ir.Value) -> None:
    """A single group of 32 columns."""
    start = builder.bitcast(_lanes_of(builder, own, _STARTS, two_groups=False), SHORTS)
    totals = [cgutils.alloca_once_value(builder, every(SHORTS, 0)) for _ in range(2)]
    for total in totals:
        builder.store(start, total)
    with cgutils.for_range(builder, rows.num_pairs) as loop:
        a, b = (rows.values(builder, loop.index, parity, 0, 16) for parity in range(2))
        rows.prefetch(builder, loop.index, 0)
        both = shuffle(builder, a, b, [lane for i in range(16) for lane in (i, 16 + i)])
        place = builder.add(times(builder, loop.index, 32), constant(_PAIRS))
        factors = builder.bitcast(_lanes_of(builder, own, place, two_groups=False), BYTES)
        _add_nibbles(builder, both, factors, *totals)
    scale = splat(builder, load(builder, own, _SCALES, FLOAT))
    for high, total in enumerate(totals):
        whole = builder.load(total)
        for half in range(2):
            lanes = builder.sext(shuffle(builder, whole, None, range(8 * half, 8 * half + 8)), INTS)
            _accumulate(builder, lanes, scale, y_group, 16 * high + 8 * half)


def _add_nibbles(builder: ir.IRBuilder, both: ir.Value, factors: ir.Value, low: ir.Value, high: ir.Value) -> None:
    """both: 16 times a byte of each row of a pair; add its low and high nibbles' products to two sums."""
    shifted = builder.bitcast(builder.lshr(builder.bitcast(both, SHORTS), every(SHORTS, 4)), BYTES)
    for nibbles, total in ((both, low), (shifted, high)):
        pairs = builder.and_(nibbles, every(BYTES, 15))
        builder.store(pair_madd(builder, pairs, factors, builder.load(total)), total)


def _add_q8_group(builder: ir.IRBuilder, row_format: RowFormat, rows: _Rows, own: ir.Value, y_group: ir.Value) -> None:
    scale = splat(builder, load(builder, own, _SCALES, FLOAT))
    in_lanes = {0: (0, 1, 2, 3, 8, 9, 10, 11), 1: (4, 5, 6, 7, 12, 13, 14, 15)}  # what AVX2 interleaves at once
    for column in range(0, row_format.group, 16):
        totals = [cgutils.alloca_once_value(builder, every(INTS, 0)) for _ in range(2)]
        for total in totals:
            builder.store(every(INTS, 0), total)
        with cgutils.for_range(builder, rows.num_pairs) as loop:
            a, b = (builder.sext(rows.values(builder, loop.index, parity, column, 16), SHORTS) for parity in range(2))
            if column % 32 == 0:
                rows.prefetch(builder, loop.index, column)
            place = builder.add(times(builder, loop.index, 32), constant(_PAIRS))
            factors = builder.bitcast(_lanes_of(builder, own, place, two_groups=False), SHORTS)
            for part, total in enumerate(totals):
                both = shuffle(builder, a, b, [lane for i in in_lanes[part] for lane in (i, 16 + i)])
                builder.store(short_pair_madd(builder, both, factors, builder.load(total)), total)
        low, high = (builder.load(total) for total in totals)
        _accumulate(builder, shuffle(builder, low, high, [0, 1, 2, 3, 8, 9, 10, 11]), scale, y_group, column)
        _accumulate(builder, shuffle(builder, low, high, [4, 5, 6, 7, 12, 13, 14, 15]), scale, y_group, column + 8)


def _accumulate(builder: ir.IRBuilder, whole: ir.Value, scale: ir.Value, y_group: ir.Value, place: int) -> None:
    earlier = load(builder, y_group, 4 * place, FLOATS)
    store(builder, fma(builder, builder.sitofp(whole, FLOATS), scale, earlier), y_group, 4 * place)


@intrinsic
def int8_add_rows(  # type: ignore[no-untyped-def]
    typing_context, code, rows, factors, num_pairs, y, num_groups, scales_offset, scratch, aheads
):
    """Add 2 * num_pairs <= MOST_ROWS packed rows, each times its factor, to y. All arguments int64.

    rows: address of int64 addresses; factors: of float32; y: of float32 [num_groups * group] in packed order;
    scales_offset: bytes from a row to its scales; scratch: of SCRATCH_BYTES bytes; aheads: address of as many int64
    addresses of rows that are prefetched meanwhile.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        switch_formats(builder, args[0], _emit_add_rows, args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), generate
