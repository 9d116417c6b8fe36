"""Absmax quantization compiled for CPUs: one row after another, each read from memory once and written once.

A row is one token in one KV head. numba has neither float16 nor bfloat16: uint16 stands for the one, int16 for the
other. The loops over a row are short and without branches, so that LLVM makes vector instructions of them. The
intrinsics say what Python cannot: operations on eight or 32 bits, and changes of type that leave the bits alone.
"""

from typing import Any

import numpy as np
from numba import types

from spectrumkv.kernels.jit.compiled import compiled, intrinsic
from spectrumkv.kernels.jit.llvm import (
    F32,
    HALF,
    I8,
    I16,
    I32,
    ROUNDER,
    float_of,
    greater_magnitude,
    rounded_to_bfloat16,
    to_float32,
)

ZERO, INFINITY = np.float32(0), np.float32(np.inf)
FLOAT16_MAX = 65504.0


@intrinsic
def sixteen_bits(_: Any, element: Any) -> Any:
    """An element at 16 bits: float32 rounded half to even to float16, or to infinity; others as they are."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        narrow = builder.fptrunc(arguments[0], HALF) if element == types.float32 else arguments[0]
        return builder.bitcast(narrow, I16)

    return types.uint16(element), emit


@intrinsic
def element(_: Any, bits: Any, row: Any) -> Any:
    """Inverse of `sixteen_bits`: an element of the row's type."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if row.dtype != types.float32:
            return arguments[0]
        return builder.fpext(builder.bitcast(arguments[0], HALF), F32)

    return row.dtype(types.uint16, row), emit


@intrinsic
def _rounded(_: Any, value: Any, row: Any) -> Any:
    """A float32 rounded half to even to the type of the row's elements; float16 saturates."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[0]
        if row.dtype == types.float32:
            return value
        if row.dtype == types.uint16:
            value = builder.select(builder.fcmp_ordered(">", value, F32(FLOAT16_MAX)), F32(FLOAT16_MAX), value)
            value = builder.select(builder.fcmp_ordered("<", value, F32(-FLOAT16_MAX)), F32(-FLOAT16_MAX), value)
            return builder.bitcast(builder.fptrunc(value, HALF), I16)
        return rounded_to_bfloat16(builder, value)

    return row.dtype(types.float32, row), emit


@intrinsic
def _greater_magnitude16(_: Any, peak: Any, bits: Any) -> Any:
    """`greater_magnitude` of 16-bit floats, either kind."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        magnitude = builder.and_(arguments[1], I16(0x7FFF))
        return builder.select(builder.icmp_signed(">", magnitude, arguments[0]), magnitude, arguments[0])

    return types.int16(types.int16, types.int16), emit


@intrinsic
def _low_byte(_: Any, value: Any) -> Any:
    """The lowest eight bits of a float32."""
    return types.uint8(types.float32), lambda context, builder, signature, arguments: builder.trunc(
        builder.bitcast(arguments[0], I32), I8
    )


@intrinsic
def _pair(_: Any, low: Any, high: Any) -> Any:
    """Two INT4 codes in one byte."""
    return types.uint8(types.uint8, types.uint8), lambda context, builder, signature, arguments: builder.or_(
        builder.and_(arguments[0], I8(0xF)), builder.shl(arguments[1], I8(4))
    )


@intrinsic
def _low_nibble(_: Any, byte: Any) -> Any:
    """The low INT4 code of a byte, its sign extended to eight bits."""
    return types.int8(types.uint8), lambda context, builder, signature, arguments: builder.ashr(
        builder.shl(arguments[0], I8(4)), I8(4)
    )


@intrinsic
def _high_nibble(_: Any, byte: Any) -> Any:
    """The high INT4 code of a byte, its sign extended to eight bits."""
    return types.int8(types.uint8), lambda context, builder, signature, arguments: builder.ashr(arguments[0], I8(4))


@compiled
def _code(element: Any, divisor: Any, largest: Any) -> Any:
    """The nearest multiple of the scale, as a byte."""
    # Clamped first: the rounding holds below 2^22 only.
    steps = to_float32(element) / divisor
    steps = steps if steps < largest else largest
    steps = steps if steps > -largest else -largest
    return _low_byte(steps + ROUNDER)


@compiled
def quantize_row(row: Any, codes: Any, largest: Any, packed: bool) -> Any:
    """Write the codes of a row; return its scale as float16's bits."""
    peak = np.int32(0)
    for i in range(row.size):
        peak = greater_magnitude(peak, to_float32(row[i]))
    scale = sixteen_bits(float_of(peak) / largest)
    divisor = to_float32(scale)
    # Dividing by infinity makes the codes of a zero scale zero.
    divisor = divisor if divisor > ZERO else INFINITY
    if packed:
        high = row[codes.size :]
        for i in range(codes.size):
            codes[i] = _pair(_code(row[i], divisor, largest), _code(high[i], divisor, largest))
    else:
        for i in range(codes.size):
            codes[i] = _code(row[i], divisor, largest)
    return scale


@compiled
def dequantize_row(codes: Any, scale: Any, row: Any, packed: bool) -> None:
    """Write codes times scale into a row."""
    factor = to_float32(scale)
    if packed:
        high = row[codes.size :]
        for i in range(codes.size):
            row[i] = _rounded(np.float32(_low_nibble(codes[i])) * factor, row)
        for i in range(codes.size):
            high[i] = _rounded(np.float32(_high_nibble(codes[i])) * factor, row)
    else:
        for i in range(codes.size):
            row[i] = _rounded(np.float32(np.int8(codes[i])) * factor, row)


@compiled
def greatest_magnitude(data: Any) -> Any:
    """The greatest magnitude of the 16-bit floats in uint8 `[2 m]`, as int16 bits; NaN is above infinity."""
    elements = data.view(np.int16)
    peak = np.int16(0)
    for i in range(elements.size):
        peak = _greater_magnitude16(peak, elements[i])
    return peak
