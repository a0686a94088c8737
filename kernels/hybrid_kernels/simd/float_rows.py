"""Packed rows in SIMD registers: three Numba intrinsics that emit generic LLVM vector code for every row format.

    row_dot      sum over columns of weight * x
    row_axpy4    y += h0 * row0 + h1 * row1 + h2 * row2 + h3 * row3, one pass over y
    row_unpack   the weights as float32

LLVM does not find these loops by itself in plain Numba code. Vectors have
eight lanes, which LLVM lowers to AVX2, AVX-512 or two NEON registers alike; nothing here names an instruction set.
Arithmetic is float32 throughout, so results equal the reference's up to the order of summation.

Addresses are plain integers (a row's, x's), because a row of a bundle is not an array. A group of q4 lies in registers
as row_format describes it: word j holds in nibble i column (group / 8) * i + j, so eight lanes shifted alike, or four
words twice with two shifts, are eight neighbouring columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hybrid_kernels.native.emitted_format import emitted_formats
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.row_codes import LANES

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()
INTS, FLOATS = ir.VectorType(I32, LANES), ir.VectorType(FLOAT, LANES)

Segment = tuple[int, ir.Value]
"""A column of the group, a multiple of 8, and the levels of that and the next seven columns, as floats."""


def _group_columns(row_format: RowFormat) -> int:
    """Columns that one turn of a loop handles."""
    return row_format.group or LANES


def _load(builder: ir.IRBuilder, base: ir.Value, offset: int | ir.Value, kind: ir.Type) -> ir.Value:
    """Load from base + offset bytes, at any alignment."""
    place = builder.gep(base, [ir.Constant(I64, offset) if isinstance(offset, int) else offset])
    return builder.load(builder.bitcast(place, kind.as_pointer()), align=1)


def _splat(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    undefined = ir.Constant(FLOATS, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(INTS, [0] * LANES))


def _fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v8f32"), [a, b, c])


def _segments(builder: ir.IRBuilder, values: ir.Value, row_format: RowFormat) -> Iterator[Segment]:
    """The levels of one group, before its scale. values: i8* to the group's bytes."""
    match row_format.kind:
        case "f32":
            yield 0, _load(builder, values, 0, FLOATS)
        case "bf16":
            halves = builder.zext(_load(builder, values, 0, ir.VectorType(I16, LANES)), INTS)
            yield 0, builder.bitcast(builder.shl(halves, ir.Constant(INTS, [16] * LANES)), FLOATS)
        case "q8":
            for column in range(0, row_format.group, LANES):
                levels = _load(builder, values, column, ir.VectorType(I8, LANES))
                yield column, builder.sitofp(builder.sext(levels, INTS), FLOATS)
        case "q4":
            yield from _q4_segments(builder, values, row_format.group)


def _q4_segments(builder: ir.IRBuilder, values: ir.Value, group: int) -> Iterator[Segment]:
    num_words = group // 8

    def levels(words: ir.Value, shifts: Sequence[int]) -> ir.Value:
        nibbles = builder.and_(builder.lshr(words, ir.Constant(INTS, shifts)), ir.Constant(INTS, [15] * LANES))
        return builder.sitofp(builder.sub(nibbles, ir.Constant(INTS, [8] * LANES)), FLOATS)

    if num_words == 4:
        half = _load(builder, values, 0, ir.VectorType(I32, 4))
        words = builder.shuffle_vector(half, ir.Constant(half.type, ir.Undefined), ir.Constant(INTS, [0, 1, 2, 3] * 2))
        for pair in range(4):
            yield 8 * pair, levels(words, [8 * pair] * 4 + [8 * pair + 4] * 4)
        return
    for first_word in range(0, num_words, LANES):
        words = _load(builder, values, 4 * first_word, INTS)
        for nibble in range(8):
            yield num_words * nibble + first_word, levels(words, [4 * nibble] * LANES)


def _scale(builder: ir.IRBuilder, scales: ir.Value, group_idx: ir.Value) -> ir.Value:
    return builder.fpext(_load(builder, scales, builder.mul(group_idx, ir.Constant(I64, 2)), HALF), FLOAT)


def _group_pointers(
    builder: ir.IRBuilder, row_format: RowFormat, row: ir.Value, vector: ir.Value, group_idx: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """i8* to the group's values in the row and to its columns in a float32 vector."""
    columns = _group_columns(row_format)
    value_bytes = ir.Constant(I64, row_format.value_bytes(columns))
    return (
        builder.gep(row, [builder.mul(group_idx, value_bytes)]),
        builder.gep(vector, [builder.mul(group_idx, ir.Constant(I64, 4 * columns))]),
    )


def _as_pointers(builder: ir.IRBuilder, addresses: Sequence[ir.Value]) -> list[ir.Value]:
    return [builder.inttoptr(address, I8.as_pointer()) for address in addresses]


def _emit_dot(builder: ir.IRBuilder, row_format: RowFormat, args: Sequence[ir.Value]) -> ir.Value:
    row, scales, x = _as_pointers(builder, args[:3])
    total = cgutils.alloca_once_value(builder, ir.Constant(FLOATS, [0.0] * LANES))
    with cgutils.for_range(builder, args[3]) as loop:
        values, x_group = _group_pointers(builder, row_format, row, x, loop.index)
        sums: list[ir.Value | None] = [None, None]  # two chains of additions hide their latency
        for idx, (column, levels) in enumerate(_segments(builder, values, row_format)):
            x_lanes, earlier = _load(builder, x_group, 4 * column, FLOATS), sums[idx % 2]
            sums[idx % 2] = (
                builder.fmul(levels, x_lanes) if earlier is None else _fma(builder, levels, x_lanes, earlier)
            )
        group_sum = sums[0] if sums[1] is None else builder.fadd(sums[0], sums[1])
        if row_format.is_quantized:
            scale = _splat(builder, _scale(builder, scales, loop.index))
            builder.store(_fma(builder, group_sum, scale, builder.load(total)), total)
        else:
            builder.store(builder.fadd(group_sum, builder.load(total)), total)
    reduce = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(FLOAT, [FLOAT, FLOATS]), "llvm.vector.reduce.fadd.v8f32"
    )
    return builder.call(reduce, [ir.Constant(FLOAT, 0.0), builder.load(total)], fastmath=["reassoc"])


def _emit_axpy4(builder: ir.IRBuilder, row_format: RowFormat, args: Sequence[ir.Value]) -> None:
    rows = _as_pointers(builder, args[:4])
    factors, (y,) = args[4:8], _as_pointers(builder, args[8:9])
    scales_offset = args[10]
    with cgutils.for_range(builder, args[9]) as loop:
        sums: dict[int, ir.Value] = {}
        for row, factor in zip(rows, factors, strict=True):
            values, y_group = _group_pointers(builder, row_format, row, y, loop.index)
            if row_format.is_quantized:
                scales = builder.gep(row, [scales_offset])
                factor = builder.fmul(factor, _scale(builder, scales, loop.index))  # noqa: PLW2901  # per group
            lanes = _splat(builder, factor)
            for column, levels in _segments(builder, values, row_format):
                earlier = sums.get(column)
                if earlier is None:
                    earlier = _load(builder, y_group, 4 * column, FLOATS)
                sums[column] = _fma(builder, levels, lanes, earlier)
        for column, lanes in sums.items():
            place = builder.gep(y_group, [ir.Constant(I64, 4 * column)])
            builder.store(lanes, builder.bitcast(place, FLOATS.as_pointer()), align=4)


def _emit_unpack(builder: ir.IRBuilder, row_format: RowFormat, args: Sequence[ir.Value]) -> None:
    row, scales, output = _as_pointers(builder, args[:3])
    with cgutils.for_range(builder, args[3]) as loop:
        values, out_group = _group_pointers(builder, row_format, row, output, loop.index)
        scale = _splat(builder, _scale(builder, scales, loop.index)) if row_format.is_quantized else None
        for column, levels in _segments(builder, values, row_format):
            lanes = levels if scale is None else builder.fmul(levels, scale)
            place = builder.gep(out_group, [ir.Constant(I64, 4 * column)])
            builder.store(lanes, builder.bitcast(place, FLOATS.as_pointer()), align=4)


Emit = Callable[[ir.IRBuilder, RowFormat, Sequence[ir.Value]], ir.Value | None]


def _switch(builder: ir.IRBuilder, code: ir.Value, emit: Emit, args: Sequence[ir.Value]) -> ir.Value | None:
    """One case a format, chosen at run time: one compilation then serves every store."""
    result = None
    done = builder.append_basic_block("row_done")
    unknown = builder.append_basic_block("row_unknown")
    switch = builder.switch(code, unknown)
    with builder.goto_block(unknown):
        builder.unreachable()
    for idx, row_format in emitted_formats():
        block = builder.append_basic_block(f"row_{row_format.kind}_{row_format.group}")
        switch.add_case(ir.Constant(I64, idx), block)
        builder.position_at_end(block)
        value = emit(builder, row_format, args)
        if value is not None:
            if result is None:
                result = cgutils.alloca_once(builder, FLOAT)
            builder.store(value, result)
        builder.branch(done)
    builder.position_at_end(done)
    return None if result is None else builder.load(result)


@intrinsic
def row_dot(  # type: ignore[no-untyped-def]  # numba's protocol: types in, signature and code generator out
    typing_context, code, row, scales, x, num_groups
):
    """Dot product of a packed row with x: float32, zeros up to the last group. All arguments int64 -> float32.

    code: format_code; row, scales, x: addresses; num_groups: groups of the row (of LANES columns where it has none).
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _switch(builder, args[0], _emit_dot, args[1:])

    return types.float32(*[types.int64] * 5), generate


@intrinsic
def row_axpy4(  # type: ignore[no-untyped-def]
    typing_context, code, row0, row1, row2, row3, factor0, factor1, factor2, factor3, y, num_groups, scales_offset
):
    """Add four packed rows, each times its factor, to y: float32, room up to the last group.

    rows, y: addresses; factors: float32; scales_offset: bytes from a row to its scales.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _switch(builder, args[0], _emit_axpy4, args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, *[types.float32] * 4, *[types.int64] * 3), generate


@intrinsic
def row_unpack(  # type: ignore[no-untyped-def]
    typing_context, code, row, scales, output, num_groups
):
    """Write a packed row's weights as float32 to the address output, up to the last group. All arguments int64."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _switch(builder, args[0], _emit_unpack, args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate
