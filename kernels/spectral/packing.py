"""Streams of integers to what the entropy coder takes, and back, compiled for CPUs.

A stream's lowest bits are stored apart where they are noise, symbols beyond its limit are stored apart, and the rest
is packed: several symbols to a byte, or as gaps. All streams of a segment are one call: there are dozens, and most
are short. What is packed goes to the entropy coder in frames. A frame holds one stream, or streams that are alike
without their lowest bits.
"""

from typing import Any

import numpy as np
from numba import types

from spectrumkv.kernels.jit.compiled import compiled, intrinsic
from spectrumkv.kernels.jit.llvm import I32
from spectrumkv.kernels.spectral.gaps import pack_gaps, unpack_gaps

# Symbols that are looked at together for one beyond the limit.
LOOKED_AT = 256
# Bytes times this and shifted by 16 bits are divided by any number up to 255, exactly.
RECIPROCAL_BITS = 16
# In place of a number of symbols in a byte: the stream is packed as gaps.
GAPS = -1


@intrinsic
def _greater_magnitude(_: Any, peak: Any, symbol: Any) -> Any:
    """Return the greater one of `peak` and |symbol|, at 32 bits."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        peak, symbol = arguments
        negative = builder.icmp_signed("<", symbol, I32(0))
        magnitude = builder.select(negative, builder.neg(symbol), symbol)
        return builder.select(builder.icmp_signed(">", magnitude, peak), magnitude, peak)

    return types.int32(types.int32, types.int32), emit


@compiled
def split(symbols: Any, start: int, limit: int, raw_bits: int, raw: Any, outside: Any) -> int:
    """Take from one stream what does not go through the entropy coder; what remains is within the limit.

    Args:
        symbols: int32 `[m]`; replaced by what remains.
        start: index of the first of them in the segment.
        limit: largest magnitude that may remain.
        raw_bits: lowest bits of each symbol that are stored as they are.
        raw: uint32 `[ceil(m · raw_bits / 32)]`, written: the raw bits of one symbol after another, from bit 0 up.
        outside: int32 `[m, 2]`, written: index in the segment and value of what is beyond the limit without its raw
            bits, and remains as 0.

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
                outside[found, 0] = start + first + index
                outside[found, 1] = together[index]
                found += 1
                together[index] = 0
    return found


@compiled
def join(symbols: Any, start: int, raw_bits: int, raw: Any, outside: Any) -> None:
    """Put back what `split` took away.

    Args:
        symbols: int32 `[m]`, what went through the entropy coder; written.
        start: index of the first of them in the segment.
        raw_bits: lowest bits of each symbol that were stored as they are.
        raw: uint32 `[ceil(m · raw_bits / 32)]`.
        outside: int32 `[e, 2]`, index in the segment and value of what was beyond the limit.
    """
    for number in range(outside.shape[0]):
        symbols[outside[number, 0] - start] = outside[number, 1]
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
    """Unpack what `pack` packed.

    Args:
        packed: uint8 `[b]`.
        per_byte: symbols in one byte, from 1.
        limit: largest magnitude.
        symbols: int32 `[m]`, every one written.
    """
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


@compiled
def pack_streams(
    symbols: Any,
    start: Any,
    per_byte: Any,
    limit: Any,
    raw_bits: Any,
    packed: Any,
    packed_start: Any,
    packed_bytes: Any,
    raw: Any,
    raw_start: Any,
    outside: Any,
) -> int:
    """Call `split` and `pack` or `pack_gaps` for every stream of a segment.

    Args:
        symbols: int32 `[m]`, one stream after another; used up.
        start: int64 `[streams + 1]`, where each starts.
        per_byte: int64 `[streams]`; nothing of a stream is packed where it is 0.
        limit: int64 `[streams]`.
        raw_bits: int64 `[streams]`.
        packed: uint8, written.
        packed_start: int64 `[streams]`, where the bytes of each stream start.
        packed_bytes: int64 `[streams]`, how many there are; of gaps, how many there may be, and written.
        raw: uint32, written.
        raw_start: int64 `[streams + 1]`, where the raw bits of each stream start.
        outside: int32 `[m, 2]`, written from the first row on.

    Returns:
        How many symbols are outside.
    """
    found = 0
    for stream in range(start.size - 1):
        own = symbols[start[stream] : start[stream + 1]]
        raw_words = raw[raw_start[stream] : raw_start[stream + 1]]
        found += split(own, start[stream], limit[stream], raw_bits[stream], raw_words, outside[found:])
        own_bytes = packed[packed_start[stream] : packed_start[stream] + packed_bytes[stream]]
        if per_byte[stream] == GAPS:
            packed_bytes[stream] = pack_gaps(own, own_bytes)
        elif per_byte[stream]:
            pack(own, per_byte[stream], limit[stream], own_bytes)
    return found


@compiled
def unpack_streams(
    packed: Any,
    packed_start: Any,
    packed_bytes: Any,
    raw: Any,
    raw_start: Any,
    outside: Any,
    per_byte: Any,
    limit: Any,
    raw_bits: Any,
    start: Any,
    symbols: Any,
) -> bool:
    """Undo `pack_streams`.

    Args:
        packed: uint8; gaps are not trusted.
        packed_start: int64 `[streams]`, where each stream's bytes begin.
        packed_bytes: int64 `[streams]`, how many there are.
        raw: uint32.
        raw_start: int64 `[streams + 1]`, where the raw bits of each stream begin.
        outside: int32 `[e, 2]`, by rising index; indices are not trusted.
        per_byte: int64 `[streams]`.
        limit: int64 `[streams]`.
        raw_bits: int64 `[streams]`.
        start: int64 `[streams + 1]`, where each stream's symbols begin.
        symbols: int32 `[m]`, written.

    Returns:
        Whether indices rise and lie in the segment, and gaps in their streams; if not, the symbols are of no use.
    """
    first, last = 0, -1
    for stream in range(start.size - 1):
        own = symbols[start[stream] : start[stream + 1]]
        own_bytes = packed[packed_start[stream] : packed_start[stream] + packed_bytes[stream]]
        if per_byte[stream] == GAPS:
            if not unpack_gaps(own_bytes, own):
                return False
        elif per_byte[stream]:
            unpack(own_bytes, per_byte[stream], limit[stream], own)
        else:
            own[:] = 0
        end = first
        while end < outside.shape[0] and outside[end, 0] < start[stream + 1]:
            if outside[end, 0] <= last:
                return False
            last = outside[end, 0]
            end += 1
        raw_words = raw[raw_start[stream] : raw_start[stream + 1]]
        join(own, start[stream], raw_bits[stream], raw_words, outside[first:end])
        first = end
    return bool(first == outside.shape[0])
