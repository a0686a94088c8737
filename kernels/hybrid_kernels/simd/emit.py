"""Short names for LLVM instructions on vectors, shared by the files that generate code."""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir
from numba.core import cgutils

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()
LANES = 8
LINE_BYTES = 64  # of a cache
INTS, FLOATS = ir.VectorType(I32, LANES), ir.VectorType(FLOAT, LANES)
SHORTS, BYTES = ir.VectorType(I16, 16), ir.VectorType(I8, 32)


def constant(value: int) -> ir.Constant:
    """An int64."""
    return ir.Constant(I64, value)


def every(kind: ir.VectorType, value: float) -> ir.Constant:
    """A vector of one value."""
    return ir.Constant(kind, [value] * kind.count)


def times(builder: ir.IRBuilder, idx: ir.Value, size: int) -> ir.Value:
    """An index in bytes, or other units."""
    return builder.mul(idx, constant(size))


def load(builder: ir.IRBuilder, base: ir.Value, offset: int | ir.Value, kind: ir.Type) -> ir.Value:
    """Load from base + offset bytes, at any alignment."""
    place = builder.gep(base, [constant(offset) if isinstance(offset, int) else offset])
    return builder.load(builder.bitcast(place, kind.as_pointer()), align=1)


def store(builder: ir.IRBuilder, value: ir.Value, base: ir.Value, offset: int | ir.Value) -> None:
    """Store at base + offset bytes, at any alignment."""
    place = builder.gep(base, [constant(offset) if isinstance(offset, int) else offset])
    builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=1)


def shuffle(builder: ir.IRBuilder, a: ir.Value, b: ir.Value | None, lanes: Sequence[int]) -> ir.Value:
    """Lanes of a and b, b's numbered after a's."""
    other = ir.Constant(a.type, ir.Undefined) if b is None else b
    return builder.shuffle_vector(a, other, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def splat(builder: ir.IRBuilder, scalar: ir.Value, count: int = LANES) -> ir.Value:
    """A vector whose lanes are all the scalar."""
    kind = ir.VectorType(scalar.type, count)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
    return shuffle(builder, first, None, [0] * count)


def call(builder: ir.IRBuilder, name: str, result: ir.Type, args: Sequence[ir.Value]) -> ir.Value:
    """Call an LLVM intrinsic."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c of eight floats."""
    return call(builder, "llvm.fma.v8f32", FLOATS, [a, b, c])


def prefetch_line(builder: ir.IRBuilder, place: ir.Value) -> None:
    """Ask for the cache line of an i8*, into the second-level cache.

    The first level keeps only a few misses in flight.
    """
    args = [place, *(ir.Constant(I32, value) for value in (0, 2, 1))]  # to read, from the second level on, data
    call(builder, "llvm.prefetch.p0", ir.VoidType(), args)


def as_pointers(builder: ir.IRBuilder, addresses: Sequence[ir.Value]) -> list[ir.Value]:
    """int64 addresses as i8*."""
    return [builder.inttoptr(address, I8.as_pointer()) for address in addresses]
