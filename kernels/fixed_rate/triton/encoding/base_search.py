"""The finest base of a layer in Triton: how its exponents differ from calibration, and what records take at a base.

All of this is integers, and so the same as what `kernels.fixed_rate.rate` finds on a CPU.
"""

import triton.language as tl

from spectrumkv.kernels.fixed_rate import layout
from spectrumkv.kernels.fixed_rate.triton.encoding.segments import segment_of
from spectrumkv.kernels.fixed_rate.triton.integers import (
    BASE_RATIO,
    LOWEST_PROFILE,
    PADDED_PROFILES,
    PROFILE_RATIO,
    WIDEST,
    width_of,
)
from spectrumkv.kernels.triton_shared import jit

LOWEST_BASE, HIGHEST_BASE = tl.constexpr(layout.LOWEST_BASE), tl.constexpr(layout.HIGHEST_BASE)
# Farther than any ratio.
NO_RATIO = tl.constexpr(1 << 30)
PROFILES = tl.constexpr(layout.PROFILES)


@jit
def _words_at(
    base: tl.tensor,
    histograms_ptr: tl.tensor,
    groups_ptr: tl.tensor,
    later_ptr: tl.tensor,
    thresholds_ptr: tl.tensor,
    number_of_segments: tl.tensor,
    quarters: tl.tensor,
    later_ratio: tl.tensor,
    groups: tl.constexpr,
    block_groups: tl.constexpr,
) -> tl.tensor:
    """Return the words of this layer's records and of the later ones': int64; see `rate.words_at`."""
    profile = tl.arange(0, PADDED_PROFILES)
    added = (profile + LOWEST_PROFILE) * PROFILE_RATIO - base * BASE_RATIO
    words = tl.zeros([PADDED_PROFILES], tl.int64)
    tokens = tl.zeros([PADDED_PROFILES], tl.int64)
    for number in range(number_of_segments):
        histogram = tl.load(histograms_ptr + number * PADDED_PROFILES + profile).to(tl.int64)
        tokens += histogram
        for first in range(0, groups, block_groups):
            group = first + tl.arange(0, block_groups)
            inside = group < groups
            exponent = tl.load(groups_ptr + number * groups + group, mask=inside, other=0)
            width = width_of(exponent[:, None] + added[None, :], thresholds_ptr)
            words += histogram * tl.sum(tl.where(inside[:, None], width, 0), axis=0)
    for first in range(0, quarters, block_groups):
        quarter = first + tl.arange(0, block_groups)
        number_of_groups = tl.load(later_ptr + quarter, mask=quarter < quarters, other=0)
        ratio = (later_ratio + quarter * PROFILE_RATIO)[:, None] + added[None, :]
        width = number_of_groups[:, None] * width_of(ratio, thresholds_ptr)
        words += tokens * tl.sum(width, axis=0)
    return tl.sum(words, axis=0)


@jit
def finest_base(
    words: tl.tensor,
    histograms_ptr: tl.tensor,
    groups_ptr: tl.tensor,
    later_ptr: tl.tensor,
    thresholds_ptr: tl.tensor,
    number_of_segments: tl.tensor,
    quarters: tl.tensor,
    later_ratio: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    groups: tl.constexpr,
    block_groups: tl.constexpr,
) -> tl.tensor:
    """Return the finest base at which records keep to a number of words; see `rate.finest_base`.

    `lowest` and `highest` are the exponents of groups between which all lie.
    """
    finest = lowest + PROFILE_RATIO * LOWEST_PROFILE - tl.load(thresholds_ptr + WIDEST - 1)
    coarsest = highest + PROFILE_RATIO * (LOWEST_PROFILE + PROFILES - 1) - tl.load(thresholds_ptr)
    low = tl.minimum(tl.maximum((finest >> 1) - 1, LOWEST_BASE), HIGHEST_BASE)
    high = tl.minimum(tl.maximum((coarsest >> 1) + 1, LOWEST_BASE), HIGHEST_BASE)
    while low < high:
        middle = (low + high) >> 1
        taken = _words_at(
            middle, histograms_ptr, groups_ptr, later_ptr, thresholds_ptr, number_of_segments, quarters, later_ratio,
            groups, block_groups,
        )  # fmt: skip
        fits = taken <= words
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle + 1)
    return high


@jit
def deviation_of(
    groups_ptr: tl.tensor,
    calibrated_groups_ptr: tl.tensor,
    tokens: tl.tensor,
    size: tl.tensor,
    sinks: tl.tensor,
    groups: tl.constexpr,
    block_groups: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return by how much exponents of groups exceed the calibrated ones, in sum; of how many segments; and bounds.

    The bounds are the least and the greatest exponent of a group.
    """
    deviation, coded_segments = tl.zeros([], tl.int64), tl.zeros([], tl.int32)
    lowest, highest = tl.full([], NO_RATIO, tl.int32), tl.full([], -NO_RATIO, tl.int32)
    for number in range(tl.cdiv(tokens, size)):
        _, _, count = segment_of(number, tokens, size, sinks)
        if count > 0:
            coded_segments += 1
            for first in range(0, groups, block_groups):
                group = first + tl.arange(0, block_groups)
                inside = group < groups
                own = tl.load(groups_ptr + number * groups + group, mask=inside, other=0)
                deviation += tl.sum(
                    own.to(tl.int64) - tl.load(calibrated_groups_ptr + group, mask=inside, other=0), axis=0
                )
                lowest = tl.minimum(lowest, tl.min(tl.where(inside, own, NO_RATIO), axis=0))
                highest = tl.maximum(highest, tl.max(tl.where(inside, own, -NO_RATIO), axis=0))
    return deviation, coded_segments, lowest, highest
