"""Tiers by the rank of scores, and the placement that follows, on a GPU: one launch of one program for a layer.

Nothing is sorted. For each number of tokens that get a tier or a better one, the score of the last of them is found
bit by bit, by counting how many are at least as high. One pass over the tokens in their order then gives tiers, cuts
segments as they fill up, and numbers rows. A program alone is slow at it, but it has a model's layer of time, and
what comes next could not begin before all of it is known.
"""

import torch
import triton
import triton.language as tl

from spectrumkv.kernels import tiers as tier_codes
from spectrumkv.kernels.tier_placement import layout
from spectrumkv.kernels.tier_placement.layout import SegmentRoom, TierRanks
from spectrumkv.kernels.triton_shared import Jit, jit

# Tokens that the program looks at together.
BLOCK_TOKENS = 1024

COLUMNS = tl.constexpr(layout.SEGMENT_COLUMNS)
END, BODY_AT, COUNTS_AT = tl.constexpr(layout.END), tl.constexpr(layout.BODY_AT), tl.constexpr(layout.COUNTS_AT)
STATES_AT = tl.constexpr(layout.STATES_AT)
INT4, INT8 = tl.constexpr(tier_codes.TIER_INT4), tl.constexpr(tier_codes.TIER_INT8)
HALF = tl.constexpr(tier_codes.TIER_16BIT)
SIGN_BIT, OTHER_BITS = tl.constexpr(31), tl.constexpr(0x7FFFFFFF)
EXPONENT = tl.constexpr(0x7F800000)
NOWHERE = tl.constexpr(0x7FFFFFFF)

# A kernel of its own for each divisor of these would be compiled while a request waits.
_jit_for_any_prompt: Jit = triton.jit(
    do_not_specialize=[
        "tokens", "sinks", "end0", "end1", "end2", "tier0", "tier1", "tier2", "tier3", "int4_bytes", "int8_bytes",
        "half_bytes", "most_bytes", "most_tokens",
    ]
)  # fmt: skip


@jit
def _score_bits(scores_ptr: tl.tensor, token: tl.tensor, ranked: tl.tensor) -> tl.tensor:
    """Return the bits of scores, with one zero in place of two."""
    return (tl.load(scores_ptr + token, mask=ranked, other=0.0) + 0.0).to(tl.int32, bitcast=True)


@jit
def _ordered(bits: tl.tensor) -> tl.tensor:
    """Return int64 numbers that are ordered like the floats of these bits."""
    return (bits ^ ((bits >> SIGN_BIT) & OTHER_BITS)).to(tl.int64)


@jit
def _count(
    scores_ptr: tl.tensor, least: tl.tensor, tokens: tl.tensor, sinks: tl.tensor, block_tokens: tl.constexpr
) -> tl.tensor:
    """Count the ranked tokens that score at least as high as each of four bounds.

    Returns:
        int32 `[4]`.
    """
    found = tl.zeros([4], tl.int32)
    for at in range(0, tokens, block_tokens):
        token = at + tl.arange(0, block_tokens)
        ranked = (token < tokens) & (token >= sinks)
        score = _ordered(_score_bits(scores_ptr, token, ranked))
        high = (score[:, None] >= least[None, :]) & ranked[:, None]
        found += tl.sum(high.to(tl.int32), axis=0)
    return found


@jit
def _of_tier(tier: tl.tensor, int4: tl.tensor, int8: tl.tensor, half: tl.tensor) -> tl.tensor:
    """Return for each token the value of its tier, 0 where it is dropped."""
    return tl.where(tier == INT4, int4, tl.where(tier == INT8, int8, tl.where(tier == HALF, half, 0)))


@jit
def _close(
    segments_ptr: tl.tensor,
    number: tl.tensor,
    end: tl.tensor,
    body_at: tl.tensor,
    int4: tl.tensor,
    int8: tl.tensor,
    half: tl.tensor,
) -> None:
    """Write a segment's row of the table."""
    row_ptr = segments_ptr + number * COLUMNS
    tl.store(row_ptr + END, end.to(tl.int64))
    tl.store(row_ptr + BODY_AT, body_at)
    tl.store(row_ptr + COUNTS_AT + INT4, int4.to(tl.int64))
    tl.store(row_ptr + COUNTS_AT + INT8, int8.to(tl.int64))
    tl.store(row_ptr + COUNTS_AT + HALF, half.to(tl.int64))
    tl.store(row_ptr + STATES_AT, tl.zeros([], tl.int64))


@_jit_for_any_prompt
def _place_kernel(
    scores_ptr: tl.tensor,
    found_ptr: tl.tensor,
    segments_ptr: tl.tensor,
    places_ptr: tl.tensor,
    tiers_ptr: tl.tensor,
    tokens: tl.tensor,
    sinks: tl.tensor,
    end0: tl.tensor,
    end1: tl.tensor,
    end2: tl.tensor,
    tier0: tl.tensor,
    tier1: tl.tensor,
    tier2: tl.tensor,
    tier3: tl.tensor,
    int4_bytes: tl.tensor,
    int8_bytes: tl.tensor,
    half_bytes: tl.tensor,
    most_bytes: tl.tensor,
    most_tokens: tl.tensor,
    block_tokens: tl.constexpr,
) -> None:
    """Give a layer's tokens tiers and places; see `rank_and_place`. The grid is one program."""
    lane = tl.arange(0, 4)
    ends = tl.where(lane == 0, end0, tl.where(lane == 1, end1, end2))
    last = tl.full([4], -(1 << 31), tl.int64)
    for bit in range(32):
        tried = last + (tl.full([4], 1, tl.int64) << (31 - bit))
        last = tl.where(_count(scores_ptr, tried, tokens, sinks, block_tokens) >= ends, tried, last)
    # Of those that score like the last one, so many come first and do without: the later token counts as better.
    alike_out = _count(scores_ptr, last, tokens, sinks, block_tokens) - ends
    alike_seen = tl.zeros([4], tl.int32)

    not_finite = tl.full([], 0, tl.int32)
    number, begin = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    # Bytes up to the segment and up to the block, and tokens of each tier up to both.
    body_at, taken = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    begin4, begin8, begin16 = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    seen4, seen8, seen16 = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for at in range(0, tokens, block_tokens):
        token = at + tl.arange(0, block_tokens)
        there = token < tokens
        ranked = there & (token >= sinks)
        bits = _score_bits(scores_ptr, token, ranked)
        not_finite += tl.sum(((bits & EXPONENT) == EXPONENT).to(tl.int32), axis=0)
        score = _ordered(bits)
        alike = ((score[:, None] == last[None, :]) & ranked[:, None]).to(tl.int32)
        place = alike_seen[None, :] + tl.cumsum(alike, axis=0) - alike
        chosen = (score[:, None] > last[None, :]) | ((alike > 0) & (place >= alike_out[None, :]))
        alike_seen += tl.sum(alike, axis=0)
        better = tl.sum((chosen & (lane < 3)[None, :]).to(tl.int32), axis=1)
        tier = tl.where(better == 3, tier0, tl.where(better == 2, tier1, tl.where(better == 1, tier2, tier3)))
        tier = tl.where(token < sinks, HALF, tier)

        cost = tl.where(there, _of_tier(tier, int4_bytes, int8_bytes, half_bytes), 0).to(tl.int64)
        end_at = taken + tl.cumsum(cost, axis=0)
        is4, is8 = (there & (tier == INT4)).to(tl.int32), (there & (tier == INT8)).to(tl.int32)
        is16 = (there & (tier == HALF)).to(tl.int32)
        before4, before8 = tl.cumsum(is4, axis=0) - is4, tl.cumsum(is8, axis=0) - is8
        before16 = tl.cumsum(is16, axis=0) - is16
        row = _of_tier(tier, seen4 + before4 - begin4, seen8 + before8 - begin8, seen16 + before16 - begin16)
        segment = tl.zeros([block_tokens], tl.int32) + number
        full = there & (((end_at > body_at + most_bytes) & (token > begin)) | (token >= begin + most_tokens))
        cut = tl.min(tl.where(full, token, NOWHERE), axis=0)
        while cut < NOWHERE:
            inside = token < cut
            count4 = seen4 + tl.sum(tl.where(inside, is4, 0), axis=0)
            count8 = seen8 + tl.sum(tl.where(inside, is8, 0), axis=0)
            count16 = seen16 + tl.sum(tl.where(inside, is16, 0), axis=0)
            _close(segments_ptr, number, cut, body_at, count4 - begin4, count8 - begin8, count16 - begin16)
            body_at = taken + tl.sum(tl.where(inside, cost, 0), axis=0)
            number += 1
            begin, begin4, begin8, begin16 = cut, count4, count8, count16
            later = _of_tier(tier, seen4 + before4 - begin4, seen8 + before8 - begin8, seen16 + before16 - begin16)
            row = tl.where(inside, row, later)
            segment = tl.where(inside, segment, number)
            full = there & (((end_at > body_at + most_bytes) & (token > begin)) | (token >= begin + most_tokens))
            cut = tl.min(tl.where(full, token, NOWHERE), axis=0)
        tl.store(tiers_ptr + token, tier.to(tl.uint8), mask=there)
        tl.store(places_ptr + token, segment, mask=there)
        tl.store(places_ptr + tokens + token, row, mask=there)
        taken += tl.sum(cost, axis=0)
        seen4 += tl.sum(is4, axis=0)
        seen8 += tl.sum(is8, axis=0)
        seen16 += tl.sum(is16, axis=0)
    _close(segments_ptr, number, tokens, body_at, seen4 - begin4, seen8 - begin8, seen16 - begin16)
    tl.store(found_ptr, not_finite.to(tl.int64))
    tl.store(found_ptr + 1, (number + 1).to(tl.int64))


def rank_and_place(
    scores: torch.Tensor,
    ranks: TierRanks,
    room: SegmentRoom,
    found: torch.Tensor,
    segments: torch.Tensor,
    places: torch.Tensor,
    tiers: torch.Tensor,
) -> None:
    """Give a layer's tokens tiers by their scores, and places; of equal scores the later one is better.

    Segments are cut as `SegmentRoom` says, each as late as it can be. CPU tensors work under `TRITON_INTERPRET=1`
    only.

    Args:
        scores: float32 `[n]`, n = `ranks.tokens`. What is given to a score that is not finite is any tier.
        ranks: which tiers tokens get.
        room: of a segment.
        found: int64 `[2]` on the scores' device like the others, written: how many scores are not finite, and how
            many segments there are.
        segments: int64 `[room.most_segments(ranks), SEGMENT_COLUMNS]`, written; see `Placement`.
        places: int32 `[2, n]`, written.
        tiers: uint8 `[n]`, written.
    """
    padding = 4 - len(ranks.tiers)
    codes = (*ranks.tiers[:-1], *(ranks.tiers[-1:] * (padding + 1)))
    ends = [sum(ranks.counts[: lane + 1]) for lane in range(3)]
    with torch.cuda.device(scores.get_device()):
        _place_kernel[(1,)](
            scores,
            found,
            segments,
            places,
            tiers,
            ranks.tokens,
            ranks.sinks,
            *ends,
            *codes,
            *room.token_bytes[tier_codes.TIER_INT4 :],
            room.most_bytes,
            room.most_tokens,
            block_tokens=BLOCK_TOKENS,
            num_warps=8,
        )
