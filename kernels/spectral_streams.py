"""The loops of the spectral codec on CPUs: coefficients to streams of integers to packed bytes, and back.

Tokens are sorted by step class and coefficients lie `[rows, n]`, a row for each element of each head: keys' heads,
then values' heads. So the tokens of one class in one row are neighbours that share a step and a stream, and the loops
over them have no branches; LLVM makes vector instructions of them. Rows are visited in an order in which those of one
spread class are neighbours (a run); the integers of a run and a step class go to the stream of the difference of the
two classes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from spectrumkv.kernels.compiled import compiled

# Symbols that are looked at together for one beyond the limit.
LOOKED_AT = 256
# Bytes times this and shifted by 16 bits are divided by any number up to 255, exactly.
RECIPROCAL_BITS = 16

# numba ships no types.
_intrinsic: Callable[..., Any] = intrinsic


@_intrinsic
def _nearest(_: Any, value: Any) -> Any:
    """The nearest integer of a float32, halves to even; its magnitude is less than 2^31."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rounded = builder.call(builder.module.declare_intrinsic("llvm.rint", [ir.FloatType()]), arguments)
        return builder.fptosi(rounded, ir.IntType(32))

    return types.int32(types.float32), emit


@_intrinsic
def _greater_magnitude(_: Any, peak: Any, symbol: Any) -> Any:
    """The greater one of `peak` and |symbol|, at 32 bits."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        peak, symbol = arguments
        negative = builder.icmp_signed("<", symbol, ir.IntType(32)(0))
        magnitude = builder.select(negative, builder.neg(symbol), symbol)
        return builder.select(builder.icmp_signed(">", magnitude, peak), magnitude, peak)

    return types.int32(types.int32, types.int32), emit


@compiled
def quantize(
    coefficients: Any,
    row_order: Any,
    run_start: Any,
    class_start: Any,
    inverse_step: Any,
    stream_of: Any,
    position: Any,
    symbols: Any,
) -> None:
    """Divide coefficients by their token's step, round, and sort the integers into streams.

    Args:
        coefficients: float32 `[rows, n]`, tokens sorted by step class; finite, and less than 2^31 steps.
        row_order: int64 `[rows]`, rows sorted by spread class.
        run_start: int64 `[runs + 1]`, the first place in `row_order` of each run.
        class_start: int64 `[classes + 1]`, the first token of each step class.
        inverse_step: float32 `[classes]`.
        stream_of: int64 `[classes, runs]`.
        position: int64 `[streams]`, where each stream starts in `symbols`; moved to its end.
        symbols: int32, written.
    """
    for step_class in range(class_start.size - 1):
        begin, end = class_start[step_class], class_start[step_class + 1]
        scale, tokens = inverse_step[step_class], end - begin
        if tokens == 0:
            continue
        for run in range(run_start.size - 1):
            stream = stream_of[step_class, run]
            for place in range(run_start[run], run_start[run + 1]):
                row = coefficients[row_order[place], begin:end]
                written = symbols[position[stream] : position[stream] + tokens]
                for token in range(tokens):
                    written[token] = _nearest(row[token] * scale)
                position[stream] += tokens


@compiled
def dequantize(
    symbols: Any,
    row_order: Any,
    run_start: Any,
    class_start: Any,
    step: Any,
    stream_of: Any,
    position: Any,
    coefficients: Any,
) -> None:
    """Inverse of `quantize`; `step` is float32 `[classes]`, and every coefficient is written."""
    for step_class in range(class_start.size - 1):
        begin, end = class_start[step_class], class_start[step_class + 1]
        scale, tokens = step[step_class], end - begin
        if tokens == 0:
            continue
        for run in range(run_start.size - 1):
            stream = stream_of[step_class, run]
            for place in range(run_start[run], run_start[run + 1]):
                row = coefficients[row_order[place], begin:end]
                read = symbols[position[stream] : position[stream] + tokens]
                for token in range(tokens):
                    row[token] = np.float32(read[token]) * scale
                position[stream] += tokens


@compiled
def split(symbols: Any, limit: int, raw_bits: int, raw: Any, outside: Any, outside_value: Any) -> int:
    """Take from one stream what does not go through the entropy coder; what remains is within the limit.

    Args:
        symbols: int32 `[m]`; replaced by what remains.
        limit: largest magnitude that may remain.
        raw_bits: lowest bits of each symbol that are stored as they are.
        raw: uint32 `[ceil(m · raw_bits / 32)]`, written: the raw bits of one symbol after another, from bit 0 up.
        outside: uint32 `[m]`, written: indices of what is beyond the limit without its raw bits, and remains as 0.
        outside_value: int32 `[m]`, written: its values.

    Returns:
        How many are outside.
    """
    if raw_bits:
        held, held_bits, written = np.uint64(0), np.uint64(0), 0
        mask, width = np.uint64((1 << raw_bits) - 1), np.uint64(raw_bits)
        for index in range(symbols.size):
            held |= (np.uint64(symbols[index]) & mask) << held_bits
            held_bits += width
            if held_bits >= np.uint64(32):
                raw[written] = np.uint32(held & np.uint64(0xFFFFFFFF))
                held >>= np.uint64(32)
                held_bits -= np.uint64(32)
                written += 1
            symbols[index] >>= raw_bits
        if held_bits:
            raw[written] = np.uint32(held)
    found = 0
    for first in range(0, symbols.size, LOOKED_AT):
        together = symbols[first : first + LOOKED_AT]
        peak = np.int32(0)
        for index in range(together.size):
            peak = _greater_magnitude(peak, together[index])
        if peak <= limit:
            continue
        for index in range(together.size):
            if abs(together[index]) > limit:
                outside[found] = first + index
                outside_value[found] = together[index]
                found += 1
                together[index] = 0
    return found


@compiled
def join(symbols: Any, raw_bits: int, raw: Any, outside: Any, outside_value: Any) -> bool:
    """Inverse of `split`: put back what did not go through the entropy coder.

    Returns:
        Whether all indices of `outside` lie in the stream; if not, the symbols are of no use.
    """
    for number in range(outside.size):
        if outside[number] >= symbols.size:
            return False
        symbols[outside[number]] = outside_value[number]
    if raw_bits:
        held, held_bits, read = np.uint64(0), np.uint64(0), 0
        mask, width = np.uint64((1 << raw_bits) - 1), np.uint64(raw_bits)
        for index in range(symbols.size):
            if held_bits < width:
                held |= np.uint64(raw[read]) << held_bits
                held_bits += np.uint64(32)
                read += 1
            symbols[index] = (symbols[index] << raw_bits) | np.int32(held & mask)
            held >>= width
            held_bits -= width
    return True


@compiled
def pack(symbols: Any, per_byte: int, limit: int, packed: Any) -> None:
    """Pack symbols within ±limit: digits to the base 2 · limit + 1, those of a byte as far apart as there are bytes.

    Args:
        symbols: int32 `[m]`.
        per_byte: symbols in one byte, from 1.
        limit: largest magnitude.
        packed: uint8 `[b]` with b = ceil(m / per_byte), written: byte i has symbols i, i + b, i + 2b, …, the first
            one lowest.
    """
    base, shift, size = np.int32(2 * limit + 1), np.int32(limit), packed.size
    packed[:] = 0
    for digit in range(per_byte - 1, -1, -1):
        plane = symbols[digit * size : (digit + 1) * size]
        for index in range(plane.size):
            packed[index] = np.uint8(np.int32(packed[index]) * base + plane[index] + shift)


@compiled
def unpack(packed: Any, per_byte: int, limit: int, symbols: Any) -> None:
    """Inverse of `pack`. Every symbol is written."""
    base, shift, size = np.int32(2 * limit + 1), np.int32(limit), packed.size
    of_base = np.int32((1 << RECIPROCAL_BITS) // base + 1)
    power = np.int64(1)
    for digit in range(per_byte):
        of_power = np.int32((1 << RECIPROCAL_BITS) // power + 1)
        plane = symbols[digit * size : (digit + 1) * size]
        for index in range(plane.size):
            high = (np.int32(packed[index]) * of_power) >> np.int32(RECIPROCAL_BITS)
            higher = (high * of_base) >> np.int32(RECIPROCAL_BITS)
            plane[index] = high - higher * base - shift
        power *= np.int64(base)
