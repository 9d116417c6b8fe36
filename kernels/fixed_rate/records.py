"""Coefficients to records and back, compiled for CPUs; `reference` says what a record is, in plain torch."""

from typing import Any

import numpy as np

from spectrumkv.kernels.fixed_rate.layout import GROUP_ROWS
from spectrumkv.kernels.fixed_rate.quantizer import (
    FRACTION_BITS,
    LARGEST_MAGNITUDE,
    POSITION_BITS,
    SEGMENT_BITS,
)
from spectrumkv.kernels.jit.compiled import compiled

_LARGEST = np.float32(LARGEST_MAGNITUDE)
_UNITS = np.float32(1 << FRACTION_BITS)
_PLACE = np.int32((1 << SEGMENT_BITS) - 1)


@compiled
def pack(
    coefficients: Any,
    order: Any,
    scales: Any,
    tokens: Any,
    record: Any,
    limits: Any,
    table: Any,
    words: Any,
    escape_index: Any,
    escape_value: Any,
) -> int:
    """Quantize coefficients.

    Args:
        coefficients: float32 `[n, rows]`.
        order: int64 `[rows]`, rows by falling spread.
        scales: mean and inverse spread of each row in `order`, float32 `[rows]` each, and the inverse gain of each
            token byte, float32 `[256]`.
        tokens: uint8 `[n]`.
        record: widths, uint8 `[2 · profiles, groups]`; the row of that for each token, int64 `[n]`; the word at
            which its record starts, int64 `[n + 1]`.
        limits: float32 `[2 · profiles, groups]`, magnitudes beyond which coefficients escape.
        table: offsets and slopes of the quantizers; see `quantizer.Quantizers`.
        words: uint32, written: the records.
        escape_index: uint32 `[n · rows]`, written as far as there are escapes.
        escape_value: float32 `[n · rows]`, likewise.

    Returns:
        The number of escapes.
    """
    mean, inverse_spread, inverse_gain = scales
    widths, profiles, starts = record
    offset, slope = table
    count, rows = coefficients.shape
    normalized, cell = np.zeros(GROUP_ROWS, np.float32), np.zeros(GROUP_ROWS, np.int32)
    found = 0
    for token in range(count):
        line, gain, profile, at = coefficients[token], inverse_gain[tokens[token]], profiles[token], starts[token]
        first_escape = found
        for group in range(widths.shape[1]):
            first = group * GROUP_ROWS
            own = min(GROUP_ROWS, rows - first)
            largest = np.float32(0)
            normalized[own:] = 0
            for index in range(own):
                value = (line[order[first + index]] - mean[first + index]) * inverse_spread[first + index] * gain
                normalized[index] = value
                largest = max(largest, abs(value))
            limit = limits[profile, group]
            if largest > limit:
                for index in range(own):
                    if abs(normalized[index]) > limit:
                        row = order[first + index]
                        # Rows come by spread; the list has them by number.
                        place = found
                        while place > first_escape and escape_index[place - 1] > token * rows + row:
                            escape_index[place] = escape_index[place - 1]
                            escape_value[place] = escape_value[place - 1]
                            place -= 1
                        escape_index[place] = token * rows + row
                        escape_value[place] = line[row]
                        found += 1
            width = widths[profile, group]
            if width == 0:
                continue
            quantize(normalized, offset[width], slope[width], POSITION_BITS + 1 - width, cell)
            for plane in range(width):
                words[at] = plane_of(normalized, cell, width - 1 - plane, plane == 0)
                at += 1
    return found


@compiled
def quantize(normalized: Any, offset: Any, slope: Any, shift: int, cell: Any) -> None:
    """Find the cell of each magnitude of a group; see `reference.cells`."""
    down = np.int32(shift)
    for index in range(GROUP_ROWS):
        fixed = np.int32(min(abs(normalized[index]), _LARGEST) * _UNITS)
        segment = fixed >> np.int32(SEGMENT_BITS)
        cell[index] = (offset[segment] + slope[segment] * (fixed & _PLACE)) >> down


@compiled
def plane_of(normalized: Any, cell: Any, place: int, signs: bool) -> Any:
    """Gather one bit of each row of a group.

    Args:
        normalized: float32 `[GROUP_ROWS]`, of which the signs are taken.
        cell: int32 `[GROUP_ROWS]`, of which a bit is taken where it is not signs.
        place: of that bit.
        signs: whether the signs are wanted.

    Returns:
        uint32, bit i of row i.
    """
    word = np.uint32(0)
    if signs:
        for index in range(GROUP_ROWS):
            word |= np.uint32(normalized[index] < 0) << np.uint32(index)
    else:
        down = np.int32(place)
        for index in range(GROUP_ROWS):
            word |= np.uint32((cell[index] >> down) & np.int32(1)) << np.uint32(index)
    return word


@compiled
def unpack(words: Any, record: Any, scales: Any, tokens: Any, first: int, count: int, coefficients: Any) -> None:
    """Dequantize the records of some tokens.

    Args:
        words: uint32, the records.
        record: widths, profiles and starts as for `pack`.
        scales: order of the rows, int64 `[rows]`; mean and spread of each row in that order, float32 `[rows]` each;
            the gain of each token byte, float32 `[256]`; the levels of all quantizers, float32.
        tokens: uint8 `[n]`.
        first: the first token.
        count: how many tokens.
        coefficients: float32 `[count or more, rows]`, written.
    """
    widths, profiles, starts = record
    order, mean, spread, gains, level = scales
    rows = order.size
    entry = np.zeros(GROUP_ROWS, np.int32)
    for index in range(count):
        token = first + index
        line, gain, profile, at = coefficients[index], gains[tokens[token]], profiles[token], starts[token]
        for group in range(widths.shape[1]):
            begin = group * GROUP_ROWS
            own = min(GROUP_ROWS, rows - begin)
            width = widths[profile, group]
            if width == 0:
                for row in range(begin, begin + own):
                    line[order[row]] = mean[row]
                continue
            signs = words[at]
            entry[:] = 1
            for plane in range(at + 1, at + width):
                word = words[plane]
                for row in range(GROUP_ROWS):
                    entry[row] = (entry[row] << np.int32(1)) | np.int32((word >> np.uint32(row)) & np.uint32(1))
            at += width
            for row in range(own):
                value = level[entry[row]]
                if (signs >> np.uint32(row)) & np.uint32(1):
                    value = -value
                line[order[begin + row]] = value * gain * spread[begin + row] + mean[begin + row]
