"""Absmax quantization of one row, compiled for CPUs: a row is read from memory once and written once.

A row is one token in one KV head, of float32, or of uint16 for float16 and int16 for bfloat16, which numba lacks. The
loops over a row are short and without branches, so that LLVM makes vector instructions of them. The intrinsics say
what Python cannot: operations on eight or 32 bits, and changes of type that leave the bits alone.
"""

from typing import Any

import numpy as np
from numba import types

from spectrumkv.kernels.absmax.layout import FLOAT16_MAX
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


@intrinsic
def _sixteen_bits(_: Any, element: Any) -> Any:
    """Return an element at 16 bits: float32 rounded half to even to float16, or to infinity; others as they are."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        narrow = builder.fptrunc(arguments[0], HALF) if element == types.float32 else arguments[0]
        return builder.bitcast(narrow, I16)

    return types.uint16(element), emit


@intrinsic
def _element(_: Any, bits: Any, row: Any) -> Any:
    """Return an element of the row's type from what `_sixteen_bits` returned."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if row.dtype != types.float32:
            return arguments[0]
        return builder.fpext(builder.bitcast(arguments[0], HALF), F32)

    return row.dtype(types.uint16, row), emit


@intrinsic
def _rounded(_: Any, value: Any, row: Any) -> Any:
    """Return a float32 rounded half to even to the type of the row's elements; float16 saturates."""

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
    """Return what `greater_magnitude` returns, for 16-bit floats of either kind."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        magnitude = builder.and_(arguments[1], I16(0x7FFF))
        return builder.select(builder.icmp_signed(">", magnitude, arguments[0]), magnitude, arguments[0])

    return types.int16(types.int16, types.int16), emit


@intrinsic
def _low_byte(_: Any, value: Any) -> Any:
    """Return the lowest eight bits of a float32."""
    return types.uint8(types.float32), lambda context, builder, signature, arguments: builder.trunc(
        builder.bitcast(arguments[0], I32), I8
    )


@intrinsic
def _pair(_: Any, low: Any, high: Any) -> Any:
    """Return two INT4 codes in one byte."""
    return types.uint8(types.uint8, types.uint8), lambda context, builder, signature, arguments: builder.or_(
        builder.and_(arguments[0], I8(0xF)), builder.shl(arguments[1], I8(4))
    )


@intrinsic
def _low_nibble(_: Any, byte: Any) -> Any:
    """Return the low INT4 code of a byte, its sign extended to eight bits."""
    return types.int8(types.uint8), lambda context, builder, signature, arguments: builder.ashr(
        builder.shl(arguments[0], I8(4)), I8(4)
    )


@intrinsic
def _high_nibble(_: Any, byte: Any) -> Any:
    """Return the high INT4 code of a byte, its sign extended to eight bits."""
    return types.int8(types.uint8), lambda context, builder, signature, arguments: builder.ashr(arguments[0], I8(4))


@compiled
def _code(element: Any, divisor: Any, largest: Any) -> Any:
    """Return the nearest multiple of the scale, as a byte."""
    # Clamped first: the rounding holds below 2^22 only.
    steps = to_float32(element) / divisor
    steps = steps if steps < largest else largest
    steps = steps if steps > -largest else -largest
    return _low_byte(steps + ROUNDER)


@compiled
def quantize_row(row: Any, codes: Any, largest: Any, packed: bool) -> Any:
    """Write the codes of a row (SpectrumKV, arXiv 2606.08635, Method).

    Args:
        row: `[head_dim]`; see the module.
        codes: uint8 `[head_dim]`, or `[head_dim / 2]` where packed; written.
        largest: the greatest code, float32.
        packed: whether two codes share a byte.

    Returns:
        The row's scale as float16's bits, uint16; not finite where an element is not, or where the scale is too
        large for float16.
    """
    peak = np.int32(0)
    for i in range(row.size):
        peak = greater_magnitude(peak, to_float32(row[i]))
    scale = _sixteen_bits(float_of(peak) / largest)
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
    """Write codes times scale into a row.

    Args:
        codes: uint8 `[head_dim]`, or `[head_dim / 2]` where packed.
        scale: float16's bits, uint16.
        row: `[head_dim]`, written; see the module.
        packed: whether two codes share a byte.
    """
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
def row_to_halves(row: Any, halves: Any) -> None:
    """Write a row at 16 bits an element.

    Args:
        row: `[head_dim]`; see the module.
        halves: uint16 `[head_dim]`, written.
    """
    for i in range(row.size):
        halves[i] = _sixteen_bits(row[i])


@compiled
def row_to_float32(halves: Any, row: Any) -> None:
    """Write what `row_to_halves` wrote back into a row.

    Args:
        halves: uint16 `[head_dim]`.
        row: `[head_dim]`, written; see the module.
    """
    for i in range(row.size):
        row[i] = _element(halves[i], row)


@compiled
def greatest_magnitude(data: Any) -> Any:
    """Return the greatest magnitude of 16-bit floats, as int16 bits; NaN is above infinity.

    Args:
        data: uint8 `[2 m]`, at any address.
    """
    elements = data.view(np.int16)
    peak = np.int16(0)
    for i in range(elements.size):
        peak = _greater_magnitude16(peak, elements[i])
    return peak
