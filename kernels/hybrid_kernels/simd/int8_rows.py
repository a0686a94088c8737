"""Packed q4 and q8 rows times int8 vectors in SIMD registers: Numba intrinsics that emit LLVM vector code.

    quantize_vector   float32 -> int8 with a scale and an offset a group, in the order in which rows hold their columns
    pair_groups       that order -> the one in which int8_dot reads two small groups at once
    int8_dot          sum over columns of weight * x

Products of bytes are summed in integers over one group, and groups in float32. That rounds x to a 127th of its group's
largest (linear/reference.py states it exactly), and takes far fewer instructions than float32 does.

Vectors of q4 rows are in packed order: of a group's bytes, taken 16 (group 32) or 32 at a time, first all low nibbles,
then all high ones. `packed_columns` says which column comes where; for int8_dot, pair_groups changes that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hybrid_kernels.native.emitted_format import emitted_formats
from hybrid_kernels.packed_order import packed_columns
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
from hybrid_kernels.simd.multiply_add import dot_signed, dots_unsigned

# Quantising a vector


def _emit_quantize(builder: ir.IRBuilder, row_format: RowFormat, args: Sequence[ir.Value]) -> None:
    x, levels, scales, offsets = (builder.inttoptr(arg, I8.as_pointer()) for arg in args[:4])
    group = row_format.group
    with cgutils.for_range(builder, args[4]) as loop:
        source = builder.gep(x, [times(builder, loop.index, 4 * group)])
        lanes = [load(builder, source, 32 * part, FLOATS) for part in range(group // 8)]
        sizes = [call(builder, "llvm.fabs.v8f32", FLOATS, [part]) for part in lanes]
        largest = sizes[0]
        for part in sizes[1:]:
            largest = call(builder, "llvm.maxnum.v8f32", FLOATS, [largest, part])
        peak = call(builder, "llvm.vector.reduce.fmax.v8f32", FLOAT, [largest])
        is_zero = builder.fcmp_ordered("==", peak, ir.Constant(FLOAT, 0.0))
        inverse = builder.fdiv(ir.Constant(FLOAT, 127.0), peak)
        inverse = builder.select(is_zero, ir.Constant(FLOAT, 0.0), inverse)
        factor = splat(builder, inverse, LANES)
        rounded = [call(builder, "llvm.rint.v8f32", FLOATS, [builder.fmul(part, factor)]) for part in lanes]
        whole = [builder.fptosi(part, INTS) for part in rounded]
        total = whole[0]
        for part in whole[1:]:
            total = builder.add(total, part)
        store(builder, _in_packed_order(builder, whole, row_format), levels, times(builder, loop.index, group))
        scale = builder.fdiv(peak, ir.Constant(FLOAT, 127.0))
        place = times(builder, loop.index, 4)
        store(builder, scale, scales, place)
        level_sum = call(builder, "llvm.vector.reduce.add.v8i32", I32, [total])
        shifted = builder.sitofp(builder.mul(level_sum, ir.Constant(I32, -8)), FLOAT)
        offset = builder.fmul(shifted, scale) if row_format.kind == "q4" else ir.Constant(FLOAT, 0.0)
        store(builder, offset, offsets, place)


def _in_packed_order(builder: ir.IRBuilder, whole: list[ir.Value], row_format: RowFormat) -> ir.Value:
    parts = [builder.trunc(part, ir.VectorType(I8, LANES)) for part in whole]
    while len(parts) > 1:
        width = parts[0].type.count
        parts = [shuffle(builder, parts[idx], parts[idx + 1], range(2 * width)) for idx in range(0, len(parts), 2)]
    return shuffle(builder, parts[0], None, packed_columns(row_format))


def _in_pairs(row_format: RowFormat) -> bool:
    """Whether int8_dot takes two groups at once, wherever eight are left, and wants their levels by pair_groups."""
    return row_format.kind == "q4" and row_format.group == 32


def _emit_pair_groups(builder: ir.IRBuilder, row_format: RowFormat, args: Sequence[ir.Value]) -> None:
    if not _in_pairs(row_format):
        return
    (levels,) = as_pointers(builder, args[:1])
    num_pairs = times(builder, builder.udiv(args[1], constant(LANES)), LANES // 2)
    with cgutils.for_range(builder, num_pairs) as loop:
        pair = builder.gep(levels, [times(builder, loop.index, 64)])
        first, second = (load(builder, pair, 32 * idx, BYTES) for idx in range(2))
        store(builder, shuffle(builder, first, second, [*range(16), *range(32, 48)]), pair, 0)
        store(builder, shuffle(builder, first, second, [*range(16, 32), *range(48, 64)]), pair, 32)


# Rows times a vector


def _group_sum(
    builder: ir.IRBuilder, row_format: RowFormat, values: ir.Value, levels: ir.Value, total: ir.Value
) -> ir.Value:
    """8 int32 whose sum, added to total's, is the group's dot product in levels (of nibbles where they are q4)."""
    if row_format.kind == "q8":
        for column in range(0, row_format.group, 32):
            w, x = (load(builder, base, column, BYTES) for base in (values, levels))
            total = dot_signed(builder, w, x, total)
        return total
    parts = range(row_format.group // 32)
    factors = [
        (nibbles_of(builder, values, row_format, part), load(builder, levels, 32 * part, BYTES)) for part in parts
    ]
    return dots_unsigned(builder, factors, total)


def nibbles_of(builder: ir.IRBuilder, values: ir.Value, row_format: RowFormat, part: int) -> ir.Value:
    """32 nibbles of a group as bytes, in packed order, from the 32 * part-th on."""
    low_bits = every(BYTES, 15)
    if row_format.group == 32:
        half = load(builder, values, 0, ir.VectorType(I8, 16))
        both = builder.bitcast(shuffle(builder, half, None, [*range(16), *range(16)]), INTS)
        shifted = builder.lshr(both, ir.Constant(INTS, [0] * 4 + [4] * 4))
        return builder.and_(builder.bitcast(shifted, BYTES), low_bits)
    chunk = builder.bitcast(load(builder, values, 32 * (part // 2), BYTES), INTS)
    shifted = builder.lshr(chunk, every(INTS, 4)) if part % 2 else chunk
    return builder.and_(builder.bitcast(shifted, BYTES), low_bits)


@dataclass(frozen=True, slots=True)
class _Operands:
    """A row's values and the vector's levels."""

    row_format: RowFormat
    row: ir.Value
    levels: ir.Value

    def group_dot(self, builder: ir.IRBuilder, group_idx: ir.Value) -> ir.Value:
        """8 floats whose sum is a group's dot product in levels."""
        values = builder.gep(self.row, [times(builder, group_idx, self.row_format.value_bytes(self.row_format.group))])
        x_group = builder.gep(self.levels, [times(builder, group_idx, self.row_format.group)])
        whole = _group_sum(builder, self.row_format, values, x_group, every(INTS, 0))
        return builder.sitofp(whole, FLOATS)

    def pair_dot(self, builder: ir.IRBuilder, group_idx: ir.Value) -> ir.Value:
        """Of two groups of 32, whose 16 bytes each fill a register: half of the lanes each."""
        values = load(builder, self.row, times(builder, group_idx, 16), BYTES)
        shifted = builder.bitcast(builder.lshr(builder.bitcast(values, SHORTS), every(SHORTS, 4)), BYTES)
        x_groups = builder.gep(self.levels, [times(builder, group_idx, 32)])
        nibbles = [builder.and_(part, every(BYTES, 15)) for part in (values, shifted)]
        factors = [(part, load(builder, x_groups, 32 * idx, BYTES)) for idx, part in enumerate(nibbles)]
        return builder.sitofp(dots_unsigned(builder, factors, every(INTS, 0)), FLOATS)

    def block_dot(
        self, builder: ir.IRBuilder, first: ir.Value, scales: ir.Value, sums: list[ir.Value]
    ) -> list[ir.Value]:
        """Add LANES groups' products, times their scales, to two sums in turn."""
        if _in_pairs(self.row_format):
            turns = [(lane, [lane] * 4 + [lane + 1] * 4, self.pair_dot) for lane in range(0, LANES, 2)]
        else:
            turns = [(lane, [lane] * LANES, self.group_dot) for lane in range(LANES)]
        sums = list(sums)
        for idx, (lane, lanes, dot) in enumerate(turns):
            product = dot(builder, builder.add(first, constant(lane)))
            sums[idx % 2] = fma(builder, product, shuffle(builder, scales, None, lanes), sums[idx % 2])
        return sums


def _emit_dot(builder: ir.IRBuilder, row_format: RowFormat, args: Sequence[ir.Value]) -> ir.Value:
    row, scales, levels, x_scales, x_offsets = as_pointers(builder, args[:5])
    num_groups, aheads = args[5], as_pointers(builder, args[6:])
    operands = _Operands(row_format, row, levels)
    block_bytes = LANES * row_format.value_bytes(row_format.group)
    lines, scales_offset = range(0, block_bytes, LINE_BYTES), builder.sub(args[1], args[0])
    totals = [cgutils.alloca_once_value(builder, every(FLOATS, 0.0)) for _ in range(2)]
    offset = cgutils.alloca_once_value(builder, every(FLOATS, 0.0))
    rest = cgutils.alloca_once_value(builder, ir.Constant(FLOAT, 0.0))
    num_blocks = builder.udiv(num_groups, ir.Constant(I64, LANES))
    with cgutils.for_range(builder, num_blocks) as loop:
        first = times(builder, loop.index, LANES)
        half_scales = load(builder, scales, times(builder, first, 2), ir.VectorType(HALF, LANES))
        w_scales = builder.fpext(half_scales, FLOATS)
        x_place = times(builder, first, 4)
        both = builder.fmul(w_scales, load(builder, x_scales, x_place, FLOATS))
        if row_format.kind == "q4":
            shifts = load(builder, x_offsets, x_place, FLOATS)
            builder.store(fma(builder, w_scales, shifts, builder.load(offset)), offset)
        places = [builder.add(times(builder, loop.index, block_bytes), constant(line)) for line in lines]
        places.append(builder.add(scales_offset, times(builder, first, 2)))  # early: a row's first turn needs a scale
        for ahead in aheads:
            for place in places:
                prefetch_line(builder, builder.gep(ahead, [place]))
        sums = operands.block_dot(builder, first, both, [builder.load(total) for total in totals])
        for total, lanes in zip(totals, sums, strict=True):
            builder.store(lanes, total)
    with cgutils.for_range_slice(builder, times(builder, num_blocks, LANES), num_groups, ir.Constant(I64, 1)) as (
        group_idx,
        _,
    ):
        w_scale = builder.fpext(load(builder, scales, times(builder, group_idx, 2), HALF), FLOAT)
        place = times(builder, group_idx, 4)
        scale = builder.fmul(w_scale, load(builder, x_scales, place, FLOAT))
        dot = fma(
            builder, operands.group_dot(builder, group_idx), splat(builder, scale, LANES), builder.load(totals[0])
        )
        builder.store(dot, totals[0])
        if row_format.kind == "q4":
            shift = builder.fmul(w_scale, load(builder, x_offsets, place, FLOAT))
            builder.store(builder.fadd(builder.load(rest), shift), rest)
    lanes = builder.fadd(builder.load(totals[0]), builder.load(totals[1]))
    lanes = builder.fadd(lanes, builder.load(offset))
    kind = ir.FunctionType(FLOAT, [FLOAT, FLOATS])
    reduce = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fadd.v8f32")
    return builder.call(reduce, [builder.load(rest), lanes], fastmath=["reassoc"])


Emit = Callable[[ir.IRBuilder, RowFormat, Sequence[ir.Value]], ir.Value | None]


def switch_formats(builder: ir.IRBuilder, code: ir.Value, emit: Emit, args: Sequence[ir.Value]) -> ir.Value:
    """One case a quantised format, chosen at run time: one compilation then serves every store."""
    result = cgutils.alloca_once_value(builder, ir.Constant(FLOAT, 0.0))
    done = builder.append_basic_block("int8_done")
    switch = builder.switch(code, done)
    for idx, row_format in emitted_formats():
        if not row_format.is_quantized:
            continue
        block = builder.append_basic_block(f"int8_{row_format.kind}_{row_format.group}")
        switch.add_case(ir.Constant(I64, idx), block)
        builder.position_at_end(block)
        value = emit(builder, row_format, args)
        if value is not None:
            builder.store(value, result)
        builder.branch(done)
    builder.position_at_end(done)
    return builder.load(result)


@intrinsic
def quantize_vector(typing_context, code, x, levels, scales, offsets, num_groups):  # type: ignore[no-untyped-def]
    """Quantise float32 [num_groups * group] at x. All arguments int64: format code, addresses, groups.

    levels: int8 [num_groups * group], in packed order; scales: float32 [num_groups], a 127th of each group's largest;
    offsets: float32 [num_groups], -8 times the scale times the sum of the group's levels (q4; else 0).
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        switch_formats(builder, args[0], _emit_quantize, args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@intrinsic
def pair_groups(typing_context, code, levels, num_groups):  # type: ignore[no-untyped-def]
    """Bring levels from quantize_vector into int8_dot's order, in place: of two groups of 32, low nibbles' first."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        switch_formats(builder, args[0], _emit_pair_groups, args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@intrinsic
def int8_dot(  # type: ignore[no-untyped-def]
    typing_context, code, row, scales, levels, x_scales, x_offsets, num_groups, ahead
):
    """Dot product of a packed row with a vector from quantize_vector and pair_groups. All int64 -> float32.

    ahead: address of a row that will be read soon, or any other: it is prefetched meanwhile, since rows are too short
    for the processor to see where they lead.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return switch_formats(builder, args[0], _emit_dot, args[1:])

    return types.float32(*[types.int64] * 8), generate


@intrinsic
def int8_dot_ahead(  # type: ignore[no-untyped-def]
    typing_context, code, row, scales, levels, x_scales, x_offsets, num_groups, ahead, further
):
    """The same, with the addresses of two rows that are prefetched."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return switch_formats(builder, args[0], _emit_dot, args[1:])

    return types.float32(*[types.int64] * 9), generate
