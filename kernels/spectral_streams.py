"""The loops of the spectral codec on CPUs: coefficients to streams of integers to packed bytes, and back.

A layer's coefficients are `[heads, n, d]`: keys' heads, then values' heads. Columns are coefficients of one token
over all heads, in an order in which those of one spread class are neighbours (a run). The integers of a token's run
go to the stream that belongs to the difference of the two classes; within a stream, tokens follow each other, and
within a token its columns.
"""

from typing import Any

import numpy as np

from spectrumkv.kernels.compiled import compiled


@compiled
def quantize(
    coefficients: Any,
    token_stride: int,
    column_offset: Any,
    run_start: Any,
    row_class: Any,
    inverse_step: Any,
    stream_of: Any,
    position: Any,
    symbols: Any,
) -> None:
    """Divide coefficients by their token's step, round, and sort the integers into streams.

    Args:
        coefficients: float32, flat; finite, and less than 2^31 steps.
        token_stride: elements from one token to the next in one head.
        column_offset: int64 `[columns]`, where the first token's column lies.
        run_start: int64 `[runs + 1]`, the first column of each run.
        row_class: int64 `[n]`, each token's step class, from 0.
        inverse_step: float32 `[classes]`.
        stream_of: int64 `[classes, runs]`.
        position: int64 `[streams]`, where each stream starts in `symbols`; moved to its end.
        symbols: int32, written.
    """
    for token in range(row_class.size):
        row = row_class[token]
        scale = inverse_step[row]
        base = token * token_stride
        for run in range(run_start.size - 1):
            stream = stream_of[row, run]
            write = position[stream] - run_start[run]
            position[stream] += run_start[run + 1] - run_start[run]
            for column in range(run_start[run], run_start[run + 1]):
                symbols[write + column] = np.int32(np.rint(coefficients[base + column_offset[column]] * scale))


@compiled
def dequantize(
    symbols: Any,
    position: Any,
    stream_of: Any,
    step: Any,
    row_class: Any,
    run_start: Any,
    column_offset: Any,
    token_stride: int,
    coefficients: Any,
) -> None:
    """Inverse of `quantize`; `step` is float32 `[classes]`, and every column of every token is written."""
    for token in range(row_class.size):
        row = row_class[token]
        scale = step[row]
        base = token * token_stride
        for run in range(run_start.size - 1):
            stream = stream_of[row, run]
            read = position[stream] - run_start[run]
            position[stream] += run_start[run + 1] - run_start[run]
            for column in range(run_start[run], run_start[run + 1]):
                coefficients[base + column_offset[column]] = np.float32(symbols[read + column]) * scale


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
    for index in range(symbols.size):
        if abs(symbols[index]) > limit:
            outside[found] = index
            outside_value[found] = symbols[index]
            found += 1
            symbols[index] = 0
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
    """Pack symbols within ±limit: digits to the base 2 · limit + 1, the first one of a byte lowest.

    Args:
        symbols: int32 `[m]`.
        per_byte: symbols in one byte, from 1.
        limit: largest magnitude.
        packed: uint8 `[ceil(m / per_byte)]`, written.
    """
    if per_byte == 1:
        for index in range(symbols.size):
            packed[index] = np.uint8(symbols[index] + limit)
        return
    base = np.int32(2 * limit + 1)
    for position in range(packed.size):
        first = position * per_byte
        byte = np.int32(0)
        for index in range(min(first + per_byte, symbols.size) - 1, first - 1, -1):
            byte = byte * base + (symbols[index] + np.int32(limit))
        packed[position] = np.uint8(byte)


@compiled
def unpack(packed: Any, table: Any, symbols: Any) -> None:
    """Inverse of `pack`; `table` is int8 `[256, per_byte]`: the symbols in each byte. Every symbol is written."""
    per_byte = table.shape[1]
    whole = symbols.size // per_byte
    for position in range(whole):
        byte = packed[position]
        for digit in range(per_byte):
            symbols[position * per_byte + digit] = table[byte, digit]
    for index in range(whole * per_byte, symbols.size):
        symbols[index] = table[packed[whole], index - whole * per_byte]


@compiled
def rotate(states: Any, cosine: Any, sine: Any, scaling: float, rotated: Any) -> None:
    """Rotate elements j and j + d/2 of each head by the angle of their position, and scale.

    Args:
        states: float32 `[heads, n, d]`, any strides.
        cosine: float32 `[n, d / 2]`.
        sine: like `cosine`; negated it turns back.
        scaling: float32, factor of the result.
        rotated: float32 `[heads, n, d]`, any strides, written; it may be `states`.
    """
    heads, tokens, head_dim = states.shape
    half = head_dim // 2
    for head in range(heads):
        for token in range(tokens):
            for low in range(half):
                first, second = states[head, token, low], states[head, token, low + half]
                turn, lift = cosine[token, low], sine[token, low]
                rotated[head, token, low] = (first * turn - second * lift) * scaling
                rotated[head, token, low + half] = (second * turn + first * lift) * scaling
