"""Floats as bits, for compiled loops on CPUs."""

from typing import Any

import numpy as np
from numba import types

from spectrumkv.kernels.jit.compiled import intrinsic
from spectrumkv.kernels.jit.machine_types import F32, HALF, I16, I32

MAGNITUDE, NOT_A_NUMBER = 0x7FFFFFFF, 0x7FC00000
# 1.5 · 2^23: a float32 next to it has no fractional bits, so adding it rounds half to even, and leaves the integer in
# the low bits of the sum, in two's complement.
ROUNDER = np.float32(12582912)


@intrinsic
def greater_magnitude(_: Any, peak: Any, value: Any) -> Any:
    """The greater one of `peak` and |value|, as a float32's bits: ordered like floats, with NaN above infinity."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        magnitude = builder.and_(builder.bitcast(arguments[1], I32), I32(MAGNITUDE))
        return builder.select(builder.icmp_signed(">", magnitude, arguments[0]), magnitude, arguments[0])

    return types.int32(types.int32, types.float32), emit


@intrinsic
def float_of(_: Any, bits: Any) -> Any:
    """The float32 that has these bits."""
    return types.float32(types.int32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], F32
    )


@intrinsic
def to_float32(_: Any, element: Any) -> Any:
    """An element as float32, exactly; uint16 stands for float16 and int16 for bfloat16, which numba lacks."""

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
    """A float32 rounded half to even to bfloat16, as bits; NaN stays NaN, whatever its digits."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return rounded_to_bfloat16(builder, arguments[0])

    return types.int16(types.float32), emit


def rounded_to_bfloat16(builder: Any, value: Any) -> Any:
    """Emit `bfloat16`."""
    bits = builder.bitcast(value, I32)
    odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
    rounded = builder.add(bits, builder.add(odd, I32(0x7FFF)))
    rounded = builder.select(builder.fcmp_unordered("uno", value, value), I32(NOT_A_NUMBER), rounded)
    return builder.trunc(builder.lshr(rounded, I32(16)), I16)
