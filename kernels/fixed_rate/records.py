"""Coefficients to records and back, compiled for CPUs; `reference` says what a record is, in plain torch."""

from typing import Any

import numpy as np

from spectrumkv.kernels.fixed_rate.groups import find_windows, read_planes, write_planes
from spectrumkv.kernels.fixed_rate.layout import GROUP_ROWS
from spectrumkv.kernels.fixed_rate.trellis import TOKENS, find_paths
from spectrumkv.kernels.jit.compiled import compiled
from spectrumkv.kernels.jit.llvm import float_of, greater_magnitude


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
        order: uint64 `[rows]`, rows by falling standard deviation.
        scales: mean and inverse standard deviation of each row in `order`, float32 `[rows]` each, and the inverse
            gain of each token byte, float32 `[256]`.
        tokens: uint8 `[n]`.
        record: widths, uint8 `[2 · profiles, groups]`; the row of that for each token, int64 `[n]`; the word at
            which its record starts, int64 `[n + 1]`.
        limits: float32 `[2 · profiles, groups]`, magnitudes beyond which coefficients escape.
        table: offsets, slopes and levels of the quantizers; see `quantizer.Quantizers`.
        words: uint32, written: the records.
        escape_index: uint32 `[n · rows]`, written as far as there are escapes.
        escape_value: float32 `[n · rows]`, likewise.

    Returns:
        The number of escapes.
    """
    widths, profiles, starts = record
    offset, slope, level = table
    count, rows = coefficients.shape
    groups = widths.shape[1]
    normalized = np.zeros((groups, TOKENS, GROUP_ROWS), np.float32)
    window, at = np.zeros((TOKENS, GROUP_ROWS), np.int32), np.zeros(TOKENS, np.int64)
    cells, limit, odd = np.zeros(TOKENS, np.uint32), np.zeros(TOKENS, np.float32), np.zeros(TOKENS, np.uint32)
    found = 0
    for first in range(0, count, TOKENS):
        some = min(TOKENS, count - first)
        for index in range(some):
            token = first + index
            at[index] = starts[token]
            found = normalize(
                coefficients[token], order, scales, tokens[token], limits[profiles[token]], token * rows,
                normalized[:, index], escape_index, escape_value, found,
            )  # fmt: skip
        for group in range(groups):
            own = min(GROUP_ROWS, rows - group * GROUP_ROWS)
            used, widest = np.uint32(0xFFFFFFFF) >> np.uint32(GROUP_ROWS - own), 0
            for index in range(some):
                profile = profiles[first + index]
                width = widths[profile, group]
                widest = max(widest, width)
                cells[index], limit[index] = np.uint32(2) << np.uint32(width), limits[profile, group]
                find_windows(normalized[group, index], offset[width], slope[width], width, window[index])
            if widest:
                find_paths(normalized[group], window, cells, limit, level, odd)
            for index in range(some):
                width = widths[profiles[first + index], group]
                if width:
                    write_planes(window[index], odd[index], used, width, words, at[index])
                    at[index] += width
    return found


@compiled
def normalize(
    line: Any,
    order: Any,
    scales: Any,
    token: int,
    limits: Any,
    before: int,
    normalized: Any,
    escape_index: Any,
    escape_value: Any,
    found: int,
) -> int:
    """Divide a token's coefficients by their standard deviations and its gain, and note which are sent as they are.

    Args:
        line: float32 `[rows]`, the token's coefficients.
        order: see `pack`.
        scales: see `pack`.
        token: its byte.
        limits: float32 `[groups]`, of its profile.
        before: index of its first coefficient.
        normalized: float32 `[groups, GROUP_ROWS]`, written.
        escape_index: see `pack`.
        escape_value: see `pack`.
        found: the number of escapes before.

    Returns:
        The number of escapes now.
    """
    mean, inverse_std, inverse_gain = scales
    gain, begun = inverse_gain[token], found
    for group in range(limits.size):
        values, first = normalized[group], group * GROUP_ROWS
        own = min(GROUP_ROWS, line.size - first)
        values[own:] = 0
        for index in range(own):
            values[index] = line[order[first + index]] - mean[first + index]
        for index in range(own):
            values[index] = values[index] * inverse_std[first + index] * gain
        peak = np.int32(0)
        for index in range(GROUP_ROWS):
            peak = greater_magnitude(peak, values[index])
        if float_of(peak) > limits[group]:
            group_rows = order[first : first + own]
            found = escape(values, limits[group], group_rows, line, before, escape_index, escape_value, begun, found)
    return found


@compiled
def escape(
    normalized: Any,
    limit: float,
    group: Any,
    line: Any,
    before: int,
    escape_index: Any,
    escape_value: Any,
    first: int,
    end: int,
) -> int:
    """Note the coefficients of a token's group that are sent as they are.

    Args:
        normalized: float32 `[GROUP_ROWS]`, the group's coefficients in units of their standard deviation and gain.
        limit: magnitude beyond which they escape.
        group: uint64 `[own]`, the group's rows.
        line: float32 `[rows]`, the token's coefficients.
        before: index of the token's first coefficient.
        escape_index: uint32, written.
        escape_value: float32, written.
        first: the token's first escape.
        end: where its last one so far ends.

    Returns:
        Where its last one ends now.
    """
    for index in range(group.size):
        if abs(normalized[index]) > limit:
            row = group[index]
            insert(escape_index, escape_value, first, end, before + np.int64(row), line[row])
            end += 1
    return end


@compiled
def insert(escape_index: Any, escape_value: Any, first: int, end: int, index: int, value: float) -> None:
    """Add an escape to those of its token, whose rows come by standard deviation and are listed by number.

    Args:
        escape_index: uint32, written.
        escape_value: float32, written.
        first: the token's first escape.
        end: where its last one ends.
        index: of the escape.
        value: of the escape.
    """
    at = end
    while at > first and escape_index[at - 1] > index:
        escape_index[at] = escape_index[at - 1]
        escape_value[at] = escape_value[at - 1]
        at -= 1
    escape_index[at] = index
    escape_value[at] = value


@compiled
def unpack(words: Any, record: Any, scales: Any, tokens: Any, first: int, count: int, coefficients: Any) -> None:
    """Dequantize the records of some tokens.

    Args:
        words: uint32, the records.
        record: widths, profiles and starts as for `pack`.
        scales: order of the rows, uint64 `[rows]`; mean and standard deviation of each row in that order, float32
            `[rows]` each; the gain of each token byte, float32 `[256]`; the levels of all quantizers, float32.
        tokens: uint8 `[n]`.
        first: the first token.
        count: how many tokens.
        coefficients: float32 `[count or more, rows]`, written.
    """
    widths, profiles, starts = record
    order, mean, std, gains, level = scales
    rows = order.size
    entry, value = np.zeros(GROUP_ROWS, np.int32), np.zeros(GROUP_ROWS, np.float32)
    # Indices without a sign need no look at whether they count from the end.
    entries = entry.view(np.uint32)
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
            read_planes(words, at, width, entry)
            at += width
            for row in range(GROUP_ROWS):
                value[row] = level[entries[row]] * gain
            for row in range(own):
                value[row] = value[row] * std[begin + row] + mean[begin + row]
            for row in range(own):
                line[order[begin + row]] = value[row]
