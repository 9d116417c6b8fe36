"""Coefficients of received records in Triton: a program for each token, of any segments of a message."""

import triton.language as tl

from spectrumkv.kernels.fixed_rate.triton.integers import GROUP_ROWS, WIDEST, trellis_choices, width_of
from spectrumkv.kernels.triton_shared import jit

# What the kernel is told of each token: its segment; the 32-bit word of the upload at which its record starts; what
# it adds to the exponent of a group to make a ratio; the word at which the first of its escapes' indices is, and its
# value; how many it has; its index in the segment times rows; and its gain as the bits of a float32.
TOKEN_COLUMNS = 8
SEGMENT_AT, WORD_AT, SHIFT_AT, INDEX_AT, VALUE_AT, ESCAPES_AT, FIRST_AT, GAIN_AT = range(TOKEN_COLUMNS)
_COLUMNS, _SEGMENT, _WORD = tl.constexpr(TOKEN_COLUMNS), tl.constexpr(SEGMENT_AT), tl.constexpr(WORD_AT)
_SHIFT, _INDEX, _VALUE = tl.constexpr(SHIFT_AT), tl.constexpr(INDEX_AT), tl.constexpr(VALUE_AT)
_ESCAPES, _FIRST, _GAIN = tl.constexpr(ESCAPES_AT), tl.constexpr(FIRST_AT), tl.constexpr(GAIN_AT)


@jit
def unpack_kernel(
    words_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    order_ptr: tl.tensor,
    groups_ptr: tl.tensor,
    means_ptr: tl.tensor,
    stds_ptr: tl.tensor,
    coefficients_ptr: tl.tensor,
    level_ptr: tl.tensor,
    thresholds_ptr: tl.tensor,
    rows: tl.constexpr,
    groups: tl.constexpr,
    block_groups: tl.constexpr,
    block_escapes: tl.constexpr,
) -> None:
    """Dequantize the record of this program's token. The grid is (coded tokens).

    Segments' rows are in their order in `order_ptr`, and so are their means and standard deviations.
    """
    token = tl.program_id(0).to(tl.int64)
    token_ptr = tokens_ptr + token * _COLUMNS
    segment = tl.load(token_ptr + _SEGMENT).to(tl.int64)
    at = tl.load(token_ptr + _WORD)
    shift = tl.load(token_ptr + _SHIFT)
    gain = tl.load(token_ptr + _GAIN).to(tl.float32, bitcast=True)
    line_ptr = coefficients_ptr + token * rows
    lane = tl.arange(0, GROUP_ROWS)[None, :]
    for first in range(0, groups, block_groups):
        group = first + tl.arange(0, block_groups)
        ratio = tl.load(groups_ptr + segment * groups + group, mask=group < groups, other=0) + shift
        width = tl.where(group < groups, width_of(ratio, thresholds_ptr), 0)
        start = at + tl.cumsum(width, axis=0) - width
        at += tl.sum(width, axis=0)
        entry = tl.full([block_groups, GROUP_ROWS], 1, tl.int32)
        for plane in tl.static_range(WIDEST):
            word = tl.load(words_ptr + start + plane, mask=plane < width, other=0)
            longer = entry * 2 + ((word[:, None] >> lane) & 1)
            entry = tl.where((plane < width)[:, None], longer, entry)
        # The lowest plane says whether integers are odd.
        lowest = tl.load(words_ptr + start + width - 1, mask=width > 0, other=0)
        entry = entry * 2 + ((trellis_choices(lowest)[:, None] >> lane) & 1)
        # What the first entries stand for is 0.
        level = tl.load(level_ptr + entry)
        rank = group[:, None] * GROUP_ROWS + lane
        there = rank < rows
        row_at = segment * rows + rank
        std = tl.load(stds_ptr + row_at, mask=there, other=0.0)
        value = level * gain * std + tl.load(means_ptr + row_at, mask=there, other=0.0)
        row = tl.load(order_ptr + row_at, mask=there, other=0)
        tl.store(line_ptr + row, value, mask=there)
    # Escapes replace what was written just now.
    tl.debug_barrier()
    index_ptr, value_ptr = words_ptr + tl.load(token_ptr + _INDEX), words_ptr + tl.load(token_ptr + _VALUE)
    escapes, first_row = tl.load(token_ptr + _ESCAPES), tl.load(token_ptr + _FIRST)
    for first in range(0, escapes, block_escapes):
        escape = first + tl.arange(0, block_escapes)
        row = tl.load(index_ptr + escape, mask=escape < escapes, other=0) - first_row
        value = tl.load(value_ptr + escape, mask=escape < escapes, other=0).to(tl.float32, bitcast=True)
        tl.store(line_ptr + row, value, mask=escape < escapes)
