"""Sums of products of bytes, for each instruction set: what int8 kernels are built from."""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from hybrid_kernels.native.instruction_sets import instruction_set
from hybrid_kernels.simd.emit import BYTES, I32, INTS, SHORTS, call, every, shuffle

MOST_SHORT_SUMS = 8  # times two products of at most 15 * 127: still an int16


def dot_unsigned(builder: ir.IRBuilder, w: ir.Value, x: ir.Value, total: ir.Value) -> ir.Value:
    """w: 32 bytes 0 ... 15; x: 32 signed bytes; total: 8 int32 -> total plus sums of neighbouring products."""
    match instruction_set():
        case "avx512vnni" | "avxvnni":
            return _vpdpbusd(builder, total, w, x)
        case "avx2":
            pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", SHORTS, [w, x])
            return builder.add(total, call(builder, "llvm.x86.avx2.pmadd.wd", INTS, [pairs, every(SHORTS, 1)]))
        case "neon-dotprod":
            return _sdot(builder, w, x, total)
        case "portable":
            return _widened_dot(builder, builder.zext(w, _wide(32)), x, total)


def dots_unsigned(builder: ir.IRBuilder, factors: Sequence[tuple[ir.Value, ir.Value]], total: ir.Value) -> ir.Value:
    """dot_unsigned of up to eight pairs (w, x), whose products fit 16 bits together: widened only once."""
    if instruction_set() != "avx2":
        for w, x in factors:
            total = dot_unsigned(builder, w, x, total)
        return total
    assert len(factors) <= MOST_SHORT_SUMS
    shorts = [call(builder, "llvm.x86.avx2.pmadd.ub.sw", SHORTS, [w, x]) for w, x in factors]
    while len(shorts) > 1:
        shorts = [builder.add(*shorts[idx : idx + 2]) for idx in range(0, len(shorts) - 1, 2)] + (
            shorts[-1:] if len(shorts) % 2 else []
        )
    return builder.add(total, call(builder, "llvm.x86.avx2.pmadd.wd", INTS, [shorts[0], every(SHORTS, 1)]))


def dot_signed(builder: ir.IRBuilder, w: ir.Value, x: ir.Value, total: ir.Value) -> ir.Value:
    """The same with w signed, -127 ... 127."""
    match instruction_set():
        case "avx512vnni" | "avxvnni":
            sizes, signed = _fold_sign(builder, w, x)
            return _vpdpbusd(builder, total, sizes, signed)
        case "avx2":
            sizes, signed = _fold_sign(builder, w, x)
            pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", SHORTS, [sizes, signed])
            return builder.add(total, call(builder, "llvm.x86.avx2.pmadd.wd", INTS, [pairs, every(SHORTS, 1)]))
        case "neon-dotprod":
            return _sdot(builder, w, x, total)
        case "portable":
            return _widened_dot(builder, builder.sext(w, _wide(32)), x, total)


def _fold_sign(builder: ir.IRBuilder, w: ir.Value, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """|w| and x with w's sign: the multiply-add takes one unsigned factor."""
    sizes = call(builder, "llvm.abs.v32i8", BYTES, [w, ir.Constant(ir.IntType(1), 0)])
    return sizes, call(builder, "llvm.x86.avx2.psign.b", BYTES, [x, w])


def _vpdpbusd(builder: ir.IRBuilder, total: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    name = "llvm.x86.avx512.vpdpbusd.256"  # LLVM has one name for both encodings
    return call(builder, name, INTS, [total, w, x])


def _sdot(builder: ir.IRBuilder, w: ir.Value, x: ir.Value, total: ir.Value) -> ir.Value:
    halves = []
    for half in range(2):
        bytes_of = list(range(16 * half, 16 * half + 16))
        words = shuffle(builder, total, None, range(4 * half, 4 * half + 4))
        operands = [words, shuffle(builder, w, None, bytes_of), shuffle(builder, x, None, bytes_of)]
        halves.append(call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", words.type, operands))
    return shuffle(builder, halves[0], halves[1], range(8))


def _wide(count: int) -> ir.VectorType:
    return ir.VectorType(I32, count)


def _widened_dot(builder: ir.IRBuilder, w: ir.Value, x: ir.Value, total: ir.Value) -> ir.Value:
    products = builder.mul(w, builder.sext(x, _wide(32)))
    for part in range(4):
        total = builder.add(total, shuffle(builder, products, None, range(part, 32, 4)))  # neighbours: a panel's lanes
    return total


def pair_madd(builder: ir.IRBuilder, pairs: ir.Value, factors: ir.Value, total: ir.Value) -> ir.Value:
    """pairs: 16 times (a, b) bytes 0 ... 15; factors: 16 times (fa, fb) signed bytes; total: 16 int16.

    -> total + a * fa + b * fb, lane by lane, modulo 2^16: only the end of many must fit.
    """
    if instruction_set() in ("avx2", "avxvnni", "avx512vnni"):
        return builder.add(total, call(builder, "llvm.x86.avx2.pmadd.ub.sw", SHORTS, [pairs, factors]))
    eight = every(SHORTS, 8)
    wide_pairs, wide_factors = builder.bitcast(pairs, SHORTS), builder.bitcast(factors, SHORTS)
    first = builder.and_(wide_pairs, every(SHORTS, 255))
    first_factor = builder.ashr(builder.shl(wide_factors, eight), eight)
    total = builder.add(total, builder.mul(first, first_factor))
    return builder.add(total, builder.mul(builder.lshr(wide_pairs, eight), builder.ashr(wide_factors, eight)))


def short_pair_madd(builder: ir.IRBuilder, pairs: ir.Value, factors: ir.Value, total: ir.Value) -> ir.Value:
    """pairs, factors: 8 times (a, b) and (fa, fb) int16; total: 8 int32 -> total + a * fa + b * fb."""
    if instruction_set() in ("avx2", "avxvnni", "avx512vnni"):
        return builder.add(total, call(builder, "llvm.x86.avx2.pmadd.wd", INTS, [pairs, factors]))
    for parity in range(2):
        lanes = range(parity, 16, 2)
        a, fa = (builder.sext(shuffle(builder, both, None, lanes), INTS) for both in (pairs, factors))
        total = builder.add(total, builder.mul(a, fa))
    return total
