"""Instructions of the processor that numba has no words for: vectors, floats as bits, prefetching.

Compiled loops call the functions marked `@intrinsic` as if they were Python's. The others are called while code is
emitted: they take llvmlite's `builder` and values, and append instructions. `docs/compiled-loops.md` explains both.
"""

import platform
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types

from spectrumkv.kernels.jit.compiled import compiled, intrinsic

# --- Types that registers hold.

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, F32 = ir.HalfType(), ir.FloatType()

# --- The processor at hand.

X86 = ("x86_64", "AMD64")


def _features() -> dict[str, bool]:
    """Return what the processor has, as far as LLVM can tell."""
    try:
        found: dict[str, bool] = binding.get_host_cpu_features()
    except RuntimeError:
        return {}
    return found


def converts_float16() -> bool:
    """Return whether the processor converts float16 to float32 and back.

    Where it cannot, LLVM calls functions that are not there, and the process aborts.
    """
    return platform.machine() not in X86 or any(_features().get(one) for one in ("f16c", "avx512f"))


# --- Vectors of float32, as long as the processor's registers.

FLOAT_BYTES = 4
# Floats in a vector, and whether there are 32 registers for them, or 16. Vectors of 4 are NEON's, which has 32: x86
# processors without AVX do not convert float16 either, and are refused at the start.
LANES = 16 if _features().get("avx512f") else 8 if _features().get("avx") else 4
MANY_REGISTERS = LANES != 8
VECTOR = ir.VectorType(F32, LANES)


def pointer_to(context: Any, builder: Any, kind: Any, array: Any, start: Any) -> Any:
    """Return a pointer to element `start` of a numba array of type `kind`."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [start])


def vector_at(builder: Any, pointer: Any, offset: Any, element: Any = F32) -> Any:
    """Return a pointer to the vector of `LANES` elements that starts `offset` elements after `pointer`."""
    return builder.bitcast(builder.gep(pointer, [offset]), ir.VectorType(element, LANES).as_pointer())


def load(builder: Any, pointer: Any, alignment: int = FLOAT_BYTES) -> Any:
    """Return the vector at `pointer`, an address that `alignment` bytes divide."""
    loaded = builder.load(pointer)
    loaded.align = alignment
    return loaded


def store(builder: Any, value: Any, pointer: Any) -> None:
    """Store a vector of floats at any address that a float may have."""
    builder.store(value, pointer).align = FLOAT_BYTES


def splat(builder: Any, value: Any, lanes: int = LANES) -> Any:
    """Return a vector with one number, a float or an integer, in all lanes."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, lanes), None))


def exchanged_lanes(distance: int) -> tuple[Any, Any]:
    """Return two masks that shuffle a pair of vectors into two others: lanes at `distance` are exchanged.

    The first mask makes the vector that keeps the first one's lanes where bit `distance` of the lane is 0, the second
    mask the other one. With `distance` 1, 2, 4 … in turn, that transposes as many vectors as they have lanes (Eklundh
    1972, "A Fast Computer Method for Matrix Transposing"). Lanes of the second vector are numbered on from those of
    the first.
    """
    stay = [lane if not lane & distance else LANES + lane - distance for lane in range(LANES)]
    move = [lane + distance if not lane & distance else LANES + lane for lane in range(LANES)]
    kind = ir.VectorType(I32, LANES)
    return ir.Constant(kind, stay), ir.Constant(kind, move)


# --- Floats as bits. numba has neither float16 nor bfloat16: uint16 stands for the one, int16 for the other.

MAGNITUDE, NOT_A_NUMBER = 0x7FFFFFFF, 0x7FC00000
# 1.5 · 2^23: a float32 next to it has no fractional bits, so adding it rounds half to even, and leaves the integer in
# the low bits of the sum, in two's complement.
ROUNDER = np.float32(12582912)


@intrinsic
def greater_magnitude(_: Any, peak: Any, value: Any) -> Any:
    """Return the greater one of `peak` and |value| as a float32's bits: ordered like floats, NaN above infinity."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        magnitude = builder.and_(builder.bitcast(arguments[1], I32), I32(MAGNITUDE))
        return builder.select(builder.icmp_signed(">", magnitude, arguments[0]), magnitude, arguments[0])

    return types.int32(types.int32, types.float32), emit


@intrinsic
def float_of(_: Any, bits: Any) -> Any:
    """Return the float32 that has these bits."""
    return types.float32(types.int32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], F32
    )


@intrinsic
def to_float32(_: Any, element: Any) -> Any:
    """Return a float32, a float16 or a bfloat16 as float32, exactly."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if element == types.float32:
            return arguments[0]
        if element == types.uint16:
            return builder.fpext(builder.bitcast(arguments[0], HALF), F32)
        # bfloat16 is the upper half of a float32.
        return builder.bitcast(builder.shl(builder.zext(arguments[0], I32), I32(16)), F32)

    return types.float32(element), emit


@intrinsic
def bfloat16(_: Any, value: Any) -> Any:
    """Return a float32 rounded half to even to bfloat16, as bits; NaN stays NaN, whatever its digits."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return rounded_to_bfloat16(builder, arguments[0])

    return types.int16(types.float32), emit


def rounded_to_bfloat16(builder: Any, value: Any) -> Any:
    """Return what `bfloat16` returns, for code that emits instructions."""
    bits = builder.bitcast(value, I32)
    odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
    rounded = builder.add(bits, builder.add(odd, I32(0x7FFF)))
    rounded = builder.select(builder.fcmp_unordered("uno", value, value), I32(NOT_A_NUMBER), rounded)
    return builder.trunc(builder.lshr(rounded, I32(16)), I16)


# --- Rounding.


@intrinsic
def nearest(_: Any, value: Any) -> Any:
    """Return the nearest integer of a float32 as a float32, halves to even."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic("llvm.rint", [F32]), arguments)

    return types.float32(types.float32), emit


@intrinsic
def integer(_: Any, value: Any) -> Any:
    """Return an integer that is a float32 as an int32; any number where its magnitude is 2^31 or more."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fptosi(arguments[0], I32)

    return types.int32(types.float32), emit


# --- Prefetching, for loops whose order the processor cannot foresee.

# Elements of 32 bits in a line of the cache, and LLVM's words for "to be read", "often" and "data".
LINE = 16
READ, OFTEN, DATA = 0, 3, 1


@intrinsic
def _fetch_line(_: Any, array: Any, index: Any) -> Any:
    """Ask for the line of the cache that holds an element, and do not wait for it.

    Returns:
        The intrinsic's type, and what emits its instructions.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [address.type, I32, I32, I32])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [address.type], kind)
        builder.call(prefetch, [address, I32(READ), I32(OFTEN), I32(DATA)])
        return context.get_dummy_value()

    return types.void(array, types.int64), emit


@compiled
def fetch(array: Any, start: int, length: int) -> None:
    """Ask for `length` elements from `start` on; none is read, wherever they are.

    Args:
        array: contiguous, of elements of 32 bits.
        start: index of the first element.
        length: how many elements.
    """
    for index in range(start, start + length, LINE):
        _fetch_line(array, index)
