"""The steps of a layer in Triton: step classes of tokens, the base, and where records start.

One program does it, once all segments are measured. It is to find what `common.kv.codecs.fixed_rate` finds on a CPU:
all but the classes are integers, and so are the same.
"""

import triton.language as tl

from spectrumkv.kernels import attention_scores, step_classes
from spectrumkv.kernels.fixed_rate.triton.encoding import segments
from spectrumkv.kernels.fixed_rate.triton.encoding.base_search import deviation_of, finest_base
from spectrumkv.kernels.fixed_rate.triton.encoding.segments import segment_of, tokens_at
from spectrumkv.kernels.fixed_rate.triton.integers import (
    BASE_RATIO,
    COARSEST_CLASS,
    LOWEST_CLASS,
    LOWEST_GAIN,
    LOWEST_PROFILE,
    PADDED_PROFILES,
    PROFILE_RATIO,
    rounded,
    width_of,
)
from spectrumkv.kernels.triton_shared import is_broken, jit

COLUMNS, FIRST = tl.constexpr(segments.SEGMENT_COLUMNS), tl.constexpr(segments.FOUND_SEGMENTS)
WORDS = tl.constexpr(segments.SEGMENT_WORDS)
FOUND_BROKEN, FOUND_BASE = tl.constexpr(segments.FOUND_BROKEN), tl.constexpr(segments.FOUND_BASE)
FOUND_DRIFT, FOUND_SMOOTH = tl.constexpr(segments.FOUND_DRIFT), tl.constexpr(segments.FOUND_SMOOTH)
CLASSES_PER_OCTAVE = tl.constexpr(float(step_classes.CLASSES_PER_OCTAVE))
LEAST_SHARE = tl.constexpr(attention_scores.LEAST_SHARE)
# A kernel is told a number of words as two, so that it is the same kernel for all of them; the lower one has so many
# bits.
WORDS_SHIFT = tl.constexpr(30)


@jit
def _octave(scores_ptr: tl.tensor, token: tl.tensor, there: tl.tensor) -> tl.tensor:
    """Return the binary logarithm of tokens' shares of the attention."""
    return tl.log2(tl.maximum(tl.load(scores_ptr + token, mask=there, other=1.0), LEAST_SHARE))


@jit
def _classify(
    scores_ptr: tl.tensor,
    bodies_ptr: tl.tensor,
    gains_ptr: tl.tensor,
    histograms_ptr: tl.tensor,
    mean: tl.tensor,
    tokens: tl.tensor,
    size: tl.tensor,
    sinks: tl.tensor,
    own_tokens: tl.tensor,
    body_bytes: tl.tensor,
    exponent: tl.tensor,
    rows: tl.constexpr,
    block_layer: tl.constexpr,
) -> None:
    """Write the byte of each token that is no sink, and count the profiles of each segment."""
    for number in range(tl.cdiv(tokens, size)):
        first, own_sinks, count = segment_of(number, tokens, size, sinks)
        body_ptr = bodies_ptr + tl.cast(number, tl.int64) * body_bytes
        body_ptr += tokens_at(own_sinks, count, own_tokens, rows)
        histogram = tl.zeros([PADDED_PROFILES], tl.int32)
        for at in range(0, count, block_layer):
            coded = at + tl.arange(0, block_layer)
            there = coded < count
            token = first + own_sinks + coded
            octaves = exponent * (_octave(scores_ptr, token, there) - mean)
            step_class = rounded(octaves * CLASSES_PER_OCTAVE, LOWEST_CLASS, COARSEST_CLASS)
            gain = tl.load(gains_ptr + token, mask=there, other=0)
            byte = (gain - LOWEST_GAIN) << 4 | (step_class - LOWEST_CLASS)
            # Zeros fill up the last word.
            tl.store(body_ptr + coded, tl.where(there, byte, 0).to(tl.uint8), mask=coded < (count + 3) // 4 * 4)
            histogram += tl.histogram(gain - 2 * step_class - LOWEST_PROFILE, PADDED_PROFILES, mask=there)
        tl.store(histograms_ptr + number * PADDED_PROFILES + tl.arange(0, PADDED_PROFILES), histogram)


@jit
def _place_records(
    bodies_ptr: tl.tensor,
    found_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    histograms_ptr: tl.tensor,
    groups_ptr: tl.tensor,
    thresholds_ptr: tl.tensor,
    base: tl.tensor,
    tokens: tl.tensor,
    size: tl.tensor,
    sinks: tl.tensor,
    own_tokens: tl.tensor,
    body_bytes: tl.tensor,
    rows: tl.constexpr,
    groups: tl.constexpr,
    block_layer: tl.constexpr,
    block_groups: tl.constexpr,
) -> None:
    """Write at which word of its body's records each token's record starts, and how many words there are.

    Where histograms were, the words of a record of each profile are kept.
    """
    profile = tl.arange(0, PADDED_PROFILES)
    added = (profile + LOWEST_PROFILE) * PROFILE_RATIO - base * BASE_RATIO
    for number in range(tl.cdiv(tokens, size)):
        record = tl.zeros([PADDED_PROFILES], tl.int32)
        for first_group in range(0, groups, block_groups):
            group = first_group + tl.arange(0, block_groups)
            exponent = tl.load(groups_ptr + number * groups + group, mask=group < groups, other=0)
            width = width_of(exponent[:, None] + added[None, :], thresholds_ptr)
            record += tl.sum(tl.where((group < groups)[:, None], width, 0), axis=0)
        tl.store(histograms_ptr + number * PADDED_PROFILES + profile, record)
        tl.debug_barrier()
        first, own_sinks, count = segment_of(number, tokens, size, sinks)
        body_ptr = bodies_ptr + tl.cast(number, tl.int64) * body_bytes
        body_ptr += tokens_at(own_sinks, count, own_tokens, rows)
        taken = tl.zeros([], tl.int32)
        for at in range(0, count, block_layer):
            coded = at + tl.arange(0, block_layer)
            byte = tl.load(body_ptr + coded, mask=coded < count, other=0).to(tl.int32)
            own = (byte >> 4) + LOWEST_GAIN - 2 * ((byte & 15) + LOWEST_CLASS) - LOWEST_PROFILE
            words = tl.load(histograms_ptr + number * PADDED_PROFILES + own, mask=coded < count, other=0)
            start = taken + tl.cumsum(words, axis=0) - words
            tl.store(starts_ptr + first + own_sinks + coded, start, mask=coded < count)
            taken += tl.sum(words, axis=0)
        tl.store(found_ptr + FIRST + number * COLUMNS + WORDS, taken.to(tl.int64))


@jit
def plan_layer(
    scores_ptr: tl.tensor,
    bodies_ptr: tl.tensor,
    found_ptr: tl.tensor,
    gains_ptr: tl.tensor,
    groups_ptr: tl.tensor,
    histograms_ptr: tl.tensor,
    steps_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    calibrated_groups_ptr: tl.tensor,
    later_ptr: tl.tensor,
    thresholds_ptr: tl.tensor,
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
    rows: tl.constexpr,
    groups: tl.constexpr,
    block_layer: tl.constexpr,
    block_groups: tl.constexpr,
) -> None:
    """Give tokens their classes, find the base, and place the records, after all segments are measured."""
    total, broken = tl.zeros([], tl.float64), tl.zeros([], tl.int32)
    for at in range(0, tokens, block_layer):
        token = at + tl.arange(0, block_layer)
        broken += tl.sum(is_broken(tl.load(scores_ptr + token, mask=token < tokens, other=0.0)), axis=0)
        there = (token >= sinks) & (token < tokens)
        total += tl.sum(tl.where(there, _octave(scores_ptr, token, there), 0.0), axis=0).to(tl.float64)
    mean = (total / tl.maximum(tokens - sinks, 1)).to(tl.float32)
    _classify(
        scores_ptr, bodies_ptr, gains_ptr, histograms_ptr, mean, tokens, size, sinks, own_tokens, body_bytes,
        exponent, rows, block_layer,
    )  # fmt: skip
    tl.debug_barrier()
    deviation, coded_segments, lowest, highest = deviation_of(
        groups_ptr, calibrated_groups_ptr, tokens, size, sinks, groups, block_groups
    )
    number_of_segments = tl.cdiv(tokens, size)
    if coded_segments > 0:
        mean_deviation = deviation.to(tl.float64) / (coded_segments * groups)
        moved = drift + (mean_deviation - drift) * drift_weight
    else:
        moved = drift + tl.zeros([], tl.float64)
    later_ratio = rounded(moved.to(tl.float32), -(1 << 20), 1 << 20)
    later_ratio += lowest_quarter * PROFILE_RATIO + PROFILE_RATIO // 2
    if quarters > 0:
        lowest = tl.minimum(lowest, later_ratio)
        highest = tl.maximum(highest, later_ratio + (quarters - 1) * PROFILE_RATIO)
    words = (words_high.to(tl.int64) << WORDS_SHIFT) + words_low
    base, smooth = tl.zeros([], tl.int32), smooth_base + tl.zeros([], tl.float64)
    if coded_segments > 0:
        found = finest_base(
            words, histograms_ptr, groups_ptr, later_ptr, thresholds_ptr, number_of_segments, quarters, later_ratio,
            lowest, highest, groups, block_groups,
        )  # fmt: skip
        smooth += (found.to(tl.float64) - smooth) * base_weight
        base = rounded(smooth.to(tl.float32), -(1 << 15), 1 << 15)
    tl.debug_barrier()
    _place_records(
        bodies_ptr, found_ptr, starts_ptr, histograms_ptr, groups_ptr, thresholds_ptr, base, tokens, size, sinks,
        own_tokens, body_bytes, rows, groups, block_layer, block_groups,
    )  # fmt: skip
    tl.store(steps_ptr, base)
    # No token has a coarser base.
    tl.store(steps_ptr + 1, tokens)
    tl.store(found_ptr + FOUND_BROKEN, broken.to(tl.int64))
    tl.store(found_ptr + FOUND_BASE, base.to(tl.int64))
    tl.store(found_ptr + FOUND_DRIFT, moved.to(tl.int64, bitcast=True))
    tl.store(found_ptr + FOUND_SMOOTH, smooth.to(tl.int64, bitcast=True))
