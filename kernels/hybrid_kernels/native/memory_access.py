"""Numba intrinsics on plain addresses: loads, stores, atomics, and the two futex calls that let threads sleep.

Kernels receive addresses as int64 and no arrays, so that their object code needs nothing of Numba's run time: it is
loaded and called without importing Numba (see build.py).
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hybrid_kernels.simd.emit import prefetch_line

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()

# Linux's futex: a number of the system call by machine; elsewhere waiters take short sleeps instead.
_FUTEX = {"x86_64": 202, "aarch64": 98}
_FUTEX_WAIT_PRIVATE, _FUTEX_WAKE_PRIVATE = 128, 129
_EVERYONE = 1 << 30
NAP_US = 50  # where there is no futex
_TIMEOUT_NS = 100_000_000  # a lost wake-up, which should not happen, costs this and not a hang


def pointer(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    """An address as a pointer to that type."""
    return builder.inttoptr(address, kind.as_pointer())


def _loader(kind: ir.Type, numba_type: Any, convert: Callable[[ir.IRBuilder, ir.Value], ir.Value]) -> Any:
    @intrinsic
    def load(typing_context, base, index):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            place = builder.gep(pointer(builder, args[0], kind), [args[1]])
            return convert(builder, builder.load(place, align=1))

        return numba_type(types.int64, types.int64), generate

    return load


def _storer(kind: ir.Type, numba_type: Any) -> Any:
    @intrinsic
    def store(typing_context, base, index, value):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            value = args[2]
            if isinstance(kind, ir.IntType) and kind.width < 64:
                value = builder.trunc(value, kind)
            place = builder.gep(pointer(builder, args[0], kind), [args[1]])
            builder.store(value, place, align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, numba_type), generate

    return store


get_i64 = _loader(I64, types.int64, lambda _, value: value)
get_i32 = _loader(I32, types.int64, lambda builder, value: builder.sext(value, I64))
get_i8 = _loader(I8, types.int64, lambda builder, value: builder.sext(value, I64))
get_f32 = _loader(FLOAT, types.float32, lambda _, value: value)
get_f16 = _loader(HALF, types.float32, lambda builder, value: builder.fpext(value, FLOAT))
put_i64 = _storer(I64, types.int64)
put_i32 = _storer(I32, types.int64)
put_i8 = _storer(I8, types.int64)
put_f32 = _storer(FLOAT, types.float32)


@intrinsic
def put_f16(typing_context, base, index, value):  # type: ignore[no-untyped-def]
    """Store a float32 as float16 at base + 2 * index."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        place = builder.gep(pointer(builder, args[0], HALF), [args[1]])
        builder.store(builder.fptrunc(args[2], HALF), place, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def atomic_add(typing_context, address, amount):  # type: ignore[no-untyped-def]
    """Add to the int64 at address; return what it was before."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.atomic_rmw("add", pointer(builder, args[0], I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def atomic_get(typing_context, address):  # type: ignore[no-untyped-def]
    """Read the int64 at address and see everything that was written before it."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load_atomic(pointer(builder, args[0], I64), "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def atomic_put(typing_context, address, value):  # type: ignore[no-untyped-def]
    """Write the int64 at address after everything that was written before."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.store_atomic(args[1], pointer(builder, args[0], I64), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def ticks(typing_context):  # type: ignore[no-untyped-def]
    """The processor's time counter."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(I64, [])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.readcyclecounter"), [])

    return types.int64(), generate


@intrinsic
def relax(typing_context):  # type: ignore[no-untyped-def]
    """Tell the core that this thread only waits."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        name = {"x86_64": "llvm.x86.sse2.pause", "aarch64": "llvm.aarch64.hint", "arm64": "llvm.aarch64.hint"}
        called = name.get(platform.machine().lower(), "")
        if called:
            hint = [ir.Constant(I32, 1)] if "hint" in called else []
            kind = ir.FunctionType(ir.VoidType(), [value.type for value in hint])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, called), hint)
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def prefetch(typing_context, address):  # type: ignore[no-untyped-def]
    """Ask for the cache line at an address, which need not be one of ours."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        prefetch_line(builder, pointer(builder, args[0], I8))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def sleep_while(typing_context, address, value):  # type: ignore[no-untyped-def]
    """Sleep until wake_all(address), or not at all where the low half of the int64 there is not value's any more."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if not _has_futex():
            kind = ir.FunctionType(I32, [I32])
            function = cgutils.get_or_insert_function(builder.module, kind, "usleep")
            builder.call(function, [ir.Constant(I32, NAP_US)])
            return context.get_dummy_value()
        timeout = cgutils.alloca_once(builder, ir.ArrayType(I64, 2))
        builder.store(ir.Constant(ir.ArrayType(I64, 2), [0, _TIMEOUT_NS]), timeout)
        low = builder.and_(args[1], ir.Constant(I64, (1 << 32) - 1))
        _futex(builder, args[0], _FUTEX_WAIT_PRIVATE, low, builder.ptrtoint(timeout, I64))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def wake_all(typing_context, address):  # type: ignore[no-untyped-def]
    """Wake whoever sleeps on the int64 at address."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if _has_futex():
            _futex(builder, args[0], _FUTEX_WAKE_PRIVATE, ir.Constant(I64, _EVERYONE), ir.Constant(I64, 0))
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _has_futex() -> bool:
    return sys.platform == "linux" and sys.byteorder == "little" and platform.machine() in _FUTEX


def _futex(builder: ir.IRBuilder, address: ir.Value, operation: int, value: ir.Value, timeout: ir.Value) -> None:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I64, [I64], var_arg=True), "syscall")
    number = ir.Constant(I64, _FUTEX[platform.machine()])
    zero = ir.Constant(I64, 0)
    builder.call(function, [number, address, ir.Constant(I64, operation), value, timeout, zero, zero])


@intrinsic
def copy_bytes(typing_context, target, source, num_bytes):  # type: ignore[no-untyped-def]
    """memcpy."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        places = [pointer(builder, args[idx], I8) for idx in range(2)]
        cgutils.raw_memcpy(builder, places[0], places[1], args[2], 1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@intrinsic
def system_call(typing_context, number, first, second, third, fourth, fifth):  # type: ignore[no-untyped-def]
    """Linux's syscall(2): its result, or -errno."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I64, [I64], var_arg=True), "syscall")
        result = builder.call(function, args)
        if sys.platform != "linux":
            return result
        kind = ir.FunctionType(I32.as_pointer(), [])
        errno = builder.call(cgutils.get_or_insert_function(builder.module, kind, "__errno_location"), [])
        failed = builder.icmp_signed("==", result, ir.Constant(I64, -1))
        return builder.select(failed, builder.neg(builder.sext(builder.load(errno), I64)), result)

    return types.int64(*[types.int64] * 6), generate


@intrinsic
def read_at(typing_context, descriptor, target, num_bytes, offset):  # type: ignore[no-untyped-def]
    """POSIX's pread: how many bytes it read, or -1."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(I64, [I32, I8.as_pointer(), I64, I64])
        function = cgutils.get_or_insert_function(builder.module, kind, "pread")
        return builder.call(function, [builder.trunc(args[0], I32), pointer(builder, args[1], I8), args[2], args[3]])

    return types.int64(*[types.int64] * 4), generate


@intrinsic
def call_kernel(typing_context, function, arguments, worker, counter):  # type: ignore[no-untyped-def]
    """Call a kernel of build.py's signature by its address."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        word = I8.as_pointer()
        kind = ir.FunctionType(I32, [word.as_pointer(), word.as_pointer(), I64, I64, I64])
        result, error = cgutils.alloca_once(builder, word), cgutils.alloca_once(builder, word)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [result, error, *args[1:]])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate
