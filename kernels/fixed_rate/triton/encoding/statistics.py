"""Gains of tokens and scales of rows of a layer in Triton: a program for some rows of a segment, over its tokens.

The program that finishes a segment last sorts the segment's rows; the one that finishes the layer last plans its
steps.
"""

import triton
import triton.language as tl

from spectrumkv.kernels.fixed_rate import layout
from spectrumkv.kernels.fixed_rate.triton.encoding import segments
from spectrumkv.kernels.fixed_rate.triton.encoding.planning import plan_layer
from spectrumkv.kernels.fixed_rate.triton.encoding.scales import scale_rows, sort_rows
from spectrumkv.kernels.fixed_rate.triton.encoding.segments import scales_at, segment_of
from spectrumkv.kernels.fixed_rate.triton.integers import HIGHEST_GAIN, LOWEST_GAIN, exponent_of, is_last, rounded
from spectrumkv.kernels.triton_shared import Jit, is_broken, jit

COLUMNS, FIRST = tl.constexpr(segments.SEGMENT_COLUMNS), tl.constexpr(segments.FOUND_SEGMENTS)
TOP, BROKEN = tl.constexpr(segments.SEGMENT_TOP), tl.constexpr(segments.SEGMENT_BROKEN)
HEADER_BYTES = tl.constexpr(segments.HEADER_BYTES)
GAIN_UNITS = tl.constexpr(float(layout.PROFILE_UNITS))
EXPONENT_UNITS = tl.constexpr(layout.EXPONENT_UNITS)
MEAN_UNITS, LARGEST_MEAN = tl.constexpr(float(layout.MEAN_UNITS)), tl.constexpr(float(layout.LARGEST_MEAN))
# The least mean square, and standard deviation, that has an exponent.
LEAST = tl.constexpr(layout.LEAST_STD)

# A kernel of its own for each divisor of these would be compiled while a request waits.
_jit_for_any_prompt: Jit = triton.jit(
    do_not_specialize=[
        "tokens", "size", "sinks", "own_tokens", "body_bytes", "quarters", "lowest_quarter", "words_high", "words_low"
    ]
)  # fmt: skip


@jit
def _octaves(
    energies_ptr: tl.tensor,
    token: tl.tensor,
    there: tl.tensor,
    tokens: tl.tensor,
    heads: tl.constexpr,
    rows: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return half the binary logarithm of tokens' mean squares, and their sums of squares."""
    energy = tl.zeros_like(token).to(tl.float32)
    for head in range(heads):
        energy += tl.load(energies_ptr + tl.cast(head, tl.int64) * tokens + token, mask=there, other=0.0)
    return 0.5 * tl.log2(tl.maximum(energy / rows, LEAST)), energy


@jit
def _measure_rows(
    lines_ptr: tl.tensor,
    energies_ptr: tl.tensor,
    gains_ptr: tl.tensor,
    broken_ptr: tl.tensor,
    exponents_ptr: tl.tensor,
    row_means_ptr: tl.tensor,
    calibrated_ptr: tl.tensor,
    borders_ptr: tl.tensor,
    count: tl.tensor,
    tokens: tl.tensor,
    own: tl.tensor,
    heads: tl.constexpr,
    rows: tl.constexpr,
    block_rows: tl.constexpr,
    block_tokens: tl.constexpr,
) -> None:
    """Find exponents and means of rows over the coded tokens of a segment, and the gains of those tokens."""
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    inside = row < rows
    total = tl.zeros([], tl.float32)
    for first in range(0, count, block_tokens):
        token = first + tl.arange(0, block_tokens)
        octaves, _ = _octaves(energies_ptr, token, token < count, tokens, heads, rows)
        total += tl.sum(tl.where(token < count, octaves, 0.0), axis=0)
    level = total / count
    broken = tl.zeros([], tl.int32)
    sums, squares = tl.zeros([block_rows], tl.float64), tl.zeros([block_rows], tl.float64)
    weight_sum = tl.zeros([], tl.float64)
    for first in range(0, count, block_tokens):
        token = first + tl.arange(0, block_tokens)
        there = token < count
        octaves, energy = _octaves(energies_ptr, token, there, tokens, heads, rows)
        broken += tl.sum(is_broken(energy), axis=0)
        gain = rounded((octaves - level) * GAIN_UNITS, LOWEST_GAIN, HIGHEST_GAIN)
        if tl.program_id(0) == 0:
            tl.store(gains_ptr + token, gain, mask=there)
        weight = tl.where(there, tl.exp2(gain.to(tl.float32) * (-2.0 / GAIN_UNITS)), 0.0)
        line_ptr = lines_ptr + token.to(tl.int64)[:, None] * rows + row[None, :]
        value = tl.load(line_ptr, mask=there[:, None] & inside[None, :], other=0.0)
        weighted = value * weight[:, None]
        sums += tl.sum(weighted, axis=0).to(tl.float64)
        squares += tl.sum(weighted * value, axis=0).to(tl.float64)
        weight_sum += tl.sum(weight, axis=0).to(tl.float64)
    mean = sums / weight_sum
    variance = tl.maximum(squares - mean * sums, 0.0) / count
    # A mean is sent in units of the standard deviation, which must not be too small for it.
    std = tl.maximum(tl.sqrt(variance), tl.abs(mean) * (MEAN_UNITS / LARGEST_MEAN))
    measured = exponent_of(tl.maximum(std.to(tl.float32), LEAST), borders_ptr)
    moved = tl.load(calibrated_ptr + row, mask=inside, other=0) + rounded(level * EXPONENT_UNITS, -(1 << 16), 1 << 16)
    tl.store(exponents_ptr + row, tl.where(own, measured, moved), mask=inside)
    tl.store(row_means_ptr + row, tl.where(own, mean.to(tl.float32), 0.0), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(broken_ptr, broken.to(tl.int64))


@jit
def _broken_sinks(halves_ptr: tl.tensor, elements: tl.tensor, block: tl.constexpr) -> tl.tensor:
    """Return how many elements of a segment's sinks are infinite or NaN, as int64."""
    broken = tl.zeros([], tl.int32)
    for first in range(0, elements, block):
        element = first + tl.arange(0, block)
        value = tl.load(halves_ptr + element, mask=element < elements, other=0.0)
        broken += tl.sum(is_broken(value.to(tl.float32)), axis=0)
    return broken.to(tl.int64)


@_jit_for_any_prompt
def statistics_kernel(
    coefficients_ptr: tl.tensor,
    energies_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    bodies_ptr: tl.tensor,
    halves_ptr: tl.tensor,
    found_ptr: tl.tensor,
    gains_ptr: tl.tensor,
    exponents_ptr: tl.tensor,
    row_means_ptr: tl.tensor,
    drops_ptr: tl.tensor,
    order_ptr: tl.tensor,
    ranks_ptr: tl.tensor,
    groups_ptr: tl.tensor,
    means_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    histograms_ptr: tl.tensor,
    steps_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    calibrated_ptr: tl.tensor,
    calibrated_groups_ptr: tl.tensor,
    later_ptr: tl.tensor,
    thresholds_ptr: tl.tensor,
    borders_ptr: tl.tensor,
    powers_ptr: tl.tensor,
    tokens: tl.tensor,
    size: tl.tensor,
    sinks: tl.tensor,
    own_tokens: tl.tensor,
    body_bytes: tl.tensor,
    quarters: tl.tensor,
    lowest_quarter: tl.tensor,
    words_high: tl.tensor,
    words_low: tl.tensor,
    exponent: tl.tensor,
    drift: tl.tensor,
    drift_weight: tl.tensor,
    smooth_base: tl.tensor,
    base_weight: tl.tensor,
    heads: tl.constexpr,
    rows: tl.constexpr,
    groups: tl.constexpr,
    block_rows: tl.constexpr,
    block_tokens: tl.constexpr,
    block_groups: tl.constexpr,
    block_layer: tl.constexpr,
) -> None:
    """Measure this program's rows; sort a segment, and plan the layer, where no other program is left to do.

    The grid is (tiles of rows, segments).
    """
    number = tl.program_id(1)
    first, own_sinks, count = segment_of(number, tokens, size, sinks)
    coded = first + own_sinks
    own = count >= own_tokens
    segment_ptr = found_ptr + FIRST + number * COLUMNS
    at_row = number * rows
    if count > 0:
        _measure_rows(
            coefficients_ptr + coded.to(tl.int64) * rows, energies_ptr + coded, gains_ptr + coded, segment_ptr +
            BROKEN, exponents_ptr + at_row, row_means_ptr + at_row, calibrated_ptr, borders_ptr, count, tokens, own,
            heads, rows, block_rows, block_tokens,
        )  # fmt: skip
    if is_last(counters_ptr + number, tl.num_programs(0)):
        if count > 0:
            body_ptr = bodies_ptr + number.to(tl.int64) * body_bytes + scales_at(own_sinks, rows)
            top = scale_rows(
                body_ptr, segment_ptr + TOP, exponents_ptr + at_row, row_means_ptr + at_row, drops_ptr + at_row,
                means_ptr + at_row, inverse_ptr + at_row, powers_ptr, own, rows, block_rows,
            )  # fmt: skip
            tl.debug_barrier()
            sort_rows(
                order_ptr + at_row, ranks_ptr + at_row, groups_ptr + number * groups, drops_ptr + at_row, top, rows,
                groups, block_rows, block_groups,
            )  # fmt: skip
            broken = tl.load(segment_ptr + BROKEN)
        else:
            tl.store(segment_ptr + TOP, tl.zeros([], tl.int64))
            broken = tl.zeros([], tl.int64)
        sinks_ptr = halves_ptr + number.to(tl.int64) * (body_bytes // 2) + HEADER_BYTES // 2
        broken += _broken_sinks(sinks_ptr, own_sinks * rows, block_layer)
        tl.store(segment_ptr + BROKEN, broken)
        if is_last(counters_ptr + tl.num_programs(1), tl.num_programs(1)):
            plan_layer(
                scores_ptr, bodies_ptr, found_ptr, gains_ptr, groups_ptr, histograms_ptr, steps_ptr, starts_ptr,
                calibrated_groups_ptr, later_ptr, thresholds_ptr, tokens, size, sinks, own_tokens, body_bytes,
                quarters, lowest_quarter, words_high, words_low, exponent, drift, drift_weight, smooth_base,
                base_weight, rows, groups, block_layer, block_groups,
            )  # fmt: skip
