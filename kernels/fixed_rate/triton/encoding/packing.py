"""Records of a layer in Triton: a program for each token; the one that finishes a segment last writes its escapes."""

import triton
import triton.language as tl

from spectrumkv.kernels.fixed_rate import quantizer
from spectrumkv.kernels.fixed_rate.triton.encoding import segments
from spectrumkv.kernels.fixed_rate.triton.encoding.segments import segment_of, tokens_at, words_at
from spectrumkv.kernels.fixed_rate.triton.encoding.trellis import cell_of_remainder, find_paths, windows
from spectrumkv.kernels.fixed_rate.triton.integers import (
    BASE_RATIO,
    GROUP_ROWS,
    LOWEST_CLASS,
    LOWEST_GAIN,
    PROFILE_RATIO,
    WIDEST,
    count_bits,
    is_last,
    power_of_two,
    trellis_choices,
    width_of,
)
from spectrumkv.kernels.triton_shared import Jit, jit

LOWEST_RATIO, HIGHEST_RATIO = tl.constexpr(quantizer.LOWEST_RATIO), tl.constexpr(quantizer.HIGHEST_RATIO)
COLUMNS, FIRST = tl.constexpr(segments.SEGMENT_COLUMNS), tl.constexpr(segments.FOUND_SEGMENTS)
WORDS, ESCAPES = tl.constexpr(segments.SEGMENT_WORDS), tl.constexpr(segments.SEGMENT_ESCAPES)

# A kernel of its own for each divisor of these would be compiled while a request waits.
_jit_for_any_prompt: Jit = triton.jit(
    do_not_specialize=["tokens", "size", "sinks", "own_tokens", "body_bytes"],
)


@jit
def _normalized(
    line_ptr: tl.tensor,
    row: tl.tensor,
    there: tl.tensor,
    means_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    inverse_gain: tl.tensor,
) -> tl.tensor:
    """Return a token's coefficients over their standard deviation and its gain, by the reference's operations."""
    value = tl.load(line_ptr + row, mask=there, other=0.0)
    mean = tl.load(means_ptr + row, mask=there, other=0.0)
    return (value - mean) * tl.load(inverse_ptr + row, mask=there, other=0.0) * inverse_gain


@jit
def _bounded(ratio: tl.tensor) -> tl.tensor:
    """Return the nearest ratio of which there is a limit of escapes."""
    return tl.minimum(tl.maximum(ratio, LOWEST_RATIO), HIGHEST_RATIO)


@jit
def _write_groups(
    words_ptr: tl.tensor,
    room: tl.tensor,
    line_ptr: tl.tensor,
    order_ptr: tl.tensor,
    groups_ptr: tl.tensor,
    means_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    inverse_gain: tl.tensor,
    shift: tl.tensor,
    offset_ptr: tl.tensor,
    slope_ptr: tl.tensor,
    level_ptr: tl.tensor,
    limits_ptr: tl.tensor,
    thresholds_ptr: tl.tensor,
    rows: tl.constexpr,
    groups: tl.constexpr,
    block_groups: tl.constexpr,
) -> tl.tensor:
    """Write the record of a token, as far as there is room: the words of each group, which is a line of a tile.

    `shift` is what the token adds to the exponent of a group to make a ratio.

    Returns:
        int32, the words of the record.
    """
    lane = tl.arange(0, GROUP_ROWS)[None, :]
    at = tl.zeros([], tl.int32)
    for first in range(0, groups, block_groups):
        group = first + tl.arange(0, block_groups)
        ratio = tl.load(groups_ptr + group, mask=group < groups, other=0) + shift
        width = tl.where(group < groups, width_of(ratio, thresholds_ptr), 0)
        start = at + tl.cumsum(width, axis=0) - width
        at += tl.sum(width, axis=0)
        rank = group[:, None] * GROUP_ROWS + lane
        there = rank < rows
        row = tl.load(order_ptr + rank, mask=there, other=0)
        normalized = _normalized(line_ptr, row, there, means_ptr, inverse_ptr, inverse_gain)
        limit = tl.load(limits_ptr + _bounded(ratio) - LOWEST_RATIO)
        window = windows(normalized, width[:, None], offset_ptr, slope_ptr)
        odd = find_paths(normalized, window, width[:, None], limit[:, None], level_ptr)
        choice = (trellis_choices(odd) >> lane) & 1
        integer = cell_of_remainder(window, 2 * ((odd >> lane) & 1) + choice) >> 1
        for plane in tl.static_range(WIDEST):
            bit = (integer >> tl.maximum(width - 1 - plane, 0)[:, None]) & 1
            word = tl.sum(tl.where(there, bit, 0) << lane, axis=1)
            index = start + plane
            tl.store(words_ptr + index, word, mask=(plane < width) & (index < room))
    return at


@jit
def _find_escapes(
    bits_ptr: tl.tensor,
    line_ptr: tl.tensor,
    ranks_ptr: tl.tensor,
    groups_ptr: tl.tensor,
    means_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    inverse_gain: tl.tensor,
    shift: tl.tensor,
    limits_ptr: tl.tensor,
    rows: tl.constexpr,
    groups: tl.constexpr,
    block_groups: tl.constexpr,
) -> None:
    """Note in a bit for each row which coefficients of a token are sent as they are."""
    lane = tl.arange(0, GROUP_ROWS)[None, :]
    for first in range(0, groups, block_groups):
        word = first + tl.arange(0, block_groups)
        row = word[:, None] * GROUP_ROWS + lane
        there = row < rows
        group = tl.load(ranks_ptr + row, mask=there, other=0) // GROUP_ROWS
        ratio = _bounded(tl.load(groups_ptr + group) + shift)
        limit = tl.load(limits_ptr + ratio - LOWEST_RATIO)
        normalized = _normalized(line_ptr, row, there, means_ptr, inverse_ptr, inverse_gain)
        escapes = (there & (tl.abs(normalized) > limit)).to(tl.int32)
        tl.store(bits_ptr + word, tl.sum(escapes << lane, axis=1), mask=word < groups)


@jit
def _write_escapes(
    words_ptr: tl.tensor,
    words: tl.tensor,
    room: tl.tensor,
    found_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    lines_ptr: tl.tensor,
    count: tl.tensor,
    rows: tl.constexpr,
    groups: tl.constexpr,
    padded_words: tl.constexpr,
    block_tokens: tl.constexpr,
) -> None:
    """Write indices and values of a segment's escapes behind its records, if all of them fit.

    Bits say which; a scan over their numbers says where.
    """
    word = tl.arange(0, padded_words)[None, :]
    escapes = tl.zeros([], tl.int32)
    for first in range(0, count, block_tokens):
        token = first + tl.arange(0, block_tokens)
        there = (token < count)[:, None] & (word < groups)
        bits = tl.load(bits_ptr + token[:, None] * groups + word, mask=there, other=0).to(tl.uint32, bitcast=True)
        escapes += tl.sum(tl.sum(count_bits(bits), axis=1), axis=0)
    written = tl.where(words + 2 * escapes <= room, escapes, 0)
    seen = tl.zeros([], tl.int32)
    for first in range(0, count, block_tokens):
        token = first + tl.arange(0, block_tokens)
        there = (token < count)[:, None] & (word < groups)
        bits = tl.load(bits_ptr + token[:, None] * groups + word, mask=there, other=0).to(tl.uint32, bitcast=True)
        own = count_bits(bits)
        of_token = tl.sum(own, axis=1)
        before = seen + tl.cumsum(of_token, axis=0) - of_token
        escape = before[:, None] + tl.cumsum(own, axis=1) - own
        seen += tl.sum(of_token, axis=0)
        while tl.max(tl.max((bits != 0).to(tl.int32), axis=1), axis=0) > 0:
            row = word * GROUP_ROWS + count_bits((bits ^ (bits - 1)) >> 1)
            index = token[:, None] * rows + row
            writes = (bits != 0) & (escape < written)
            value = tl.load(lines_ptr + token[:, None].to(tl.int64) * rows + row, mask=writes, other=0.0)
            tl.store(words_ptr + words + escape, index, mask=writes)
            tl.store(words_ptr + words + escapes + escape, value.to(tl.int32, bitcast=True), mask=writes)
            escape += 1
            bits &= bits - 1
    tl.store(found_ptr, escapes.to(tl.int64))


@_jit_for_any_prompt
def pack_kernel(
    coefficients_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    words_ptr: tl.tensor,
    found_ptr: tl.tensor,
    order_ptr: tl.tensor,
    ranks_ptr: tl.tensor,
    groups_ptr: tl.tensor,
    means_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    steps_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    slope_ptr: tl.tensor,
    level_ptr: tl.tensor,
    limits_ptr: tl.tensor,
    thresholds_ptr: tl.tensor,
    powers_ptr: tl.tensor,
    tokens: tl.tensor,
    size: tl.tensor,
    sinks: tl.tensor,
    own_tokens: tl.tensor,
    body_bytes: tl.tensor,
    rows: tl.constexpr,
    groups: tl.constexpr,
    padded_words: tl.constexpr,
    block_groups: tl.constexpr,
    block_tokens: tl.constexpr,
) -> None:
    """Write the record of this program's token, and a segment's escapes where it is the last one.

    The grid is (tokens).
    """
    token = tl.program_id(0)
    number = token // size
    first, own_sinks, count = segment_of(number, tokens, size, sinks)
    body_at = number.to(tl.int64) * body_bytes
    segment_ptr = found_ptr + FIRST + number * COLUMNS
    at = words_at(own_sinks, count, own_tokens, rows)
    words_ptr += body_at // 4 + at
    room = body_bytes // 4 - at
    coded = token - first - own_sinks
    lines_ptr = coefficients_ptr + (first + own_sinks).to(tl.int64) * rows
    bits_ptr += (first + own_sinks).to(tl.int64) * groups
    if coded >= 0:
        byte = tl.load(tokens_ptr + body_at + tokens_at(own_sinks, count, own_tokens, rows) + coded).to(tl.int32)
        gain, step_class = (byte >> 4) + LOWEST_GAIN, (byte & 15) + LOWEST_CLASS
        base = tl.load(steps_ptr) + (token >= tl.load(steps_ptr + 1)).to(tl.int32)
        shift = (gain - 2 * step_class) * PROFILE_RATIO - base * BASE_RATIO
        inverse_gain = power_of_two(-2 * gain, powers_ptr)
        line_ptr = lines_ptr + coded.to(tl.int64) * rows
        start = tl.load(starts_ptr + token)
        taken = _write_groups(
            words_ptr + start, room - start, line_ptr, order_ptr + number * rows, groups_ptr + number * groups,
            means_ptr + number * rows, inverse_ptr + number * rows, inverse_gain, shift, offset_ptr, slope_ptr,
            level_ptr, limits_ptr, thresholds_ptr, rows, groups, block_groups,
        )  # fmt: skip
        if coded == count - 1:
            tl.store(segment_ptr + WORDS, (start + taken).to(tl.int64))
        _find_escapes(
            bits_ptr + coded * groups, line_ptr, ranks_ptr + number * rows, groups_ptr + number * groups,
            means_ptr + number * rows, inverse_ptr + number * rows, inverse_gain, shift, limits_ptr, rows, groups,
            block_groups,
        )  # fmt: skip
    # The first counters are those of another kernel.
    counters_ptr += tl.cdiv(tokens, size) + 1 + number
    if is_last(counters_ptr, own_sinks + count):
        # The segment may be packed again.
        tl.store(counters_ptr, 0)
        words = tl.load(segment_ptr + WORDS).to(tl.int32)
        _write_escapes(
            words_ptr, words, room, segment_ptr + ESCAPES, bits_ptr, lines_ptr, count, rows, groups, padded_words,
            block_tokens,
        )  # fmt: skip
