"""Absmax quantization in Triton: one launch for any mix of tiers, and one pass over the elements.

A program codes a few tokens, one after another, in one KV head, on one side (keys or values). A row's greatest code
follows from its token's tier, so that rows of both formats are quantized together; what differs is where they are
stored, which a `Placement` says. Of a head the first and the second half are taken apart, since two elements half a
head apart share a byte of INT4. All arithmetic is in float32 and rounds as the reference does.
"""

import triton
import triton.language as tl

from spectrumkv.kernels import tiers as tier_codes
from spectrumkv.kernels.absmax import layout
from spectrumkv.kernels.tier_placement import layout as placement
from spectrumkv.kernels.triton_shared import ROUNDER, Jit, is_broken, jit, magnitude_bits, to_states

COLUMNS, BODY_AT = tl.constexpr(placement.SEGMENT_COLUMNS), tl.constexpr(placement.BODY_AT)
COUNTS_AT, STATES_AT = tl.constexpr(placement.COUNTS_AT), tl.constexpr(placement.STATES_AT)
TIER_DROP, TIER_16BIT = tl.constexpr(tier_codes.TIER_DROP), tl.constexpr(tier_codes.TIER_16BIT)
TIER_INT4, TIER_INT8 = tl.constexpr(tier_codes.TIER_INT4), tl.constexpr(tier_codes.TIER_INT8)
LARGEST_INT8, LARGEST_INT4 = tl.constexpr(layout.INT8.largest), tl.constexpr(layout.INT4.largest)

# A kernel of its own for each divisor of a prompt's length would be compiled while a request waits.
_jit_for_any_prompt: Jit = triton.jit(do_not_specialize=["tokens"])


@jit
def _scales(low: tl.tensor, high: tl.tensor, largest: tl.tensor) -> tl.tensor:
    """Return float16 `[rows]`: the greatest magnitude of each row over its greatest code."""
    magnitude = tl.maximum(magnitude_bits(low), magnitude_bits(high))
    absmax = tl.max(magnitude, axis=1).to(tl.float32, bitcast=True)
    return tl.div_rn(absmax, largest).to(tl.float16)


@jit
def _to_codes(values: tl.tensor, scale: tl.tensor, largest: tl.tensor) -> tl.tensor:
    """Return the nearest multiples of the float16 scale as int32, 0 where the scale is 0, infinite or NaN."""
    scale = scale.to(tl.float32)
    usable = (scale > 0.0) & (scale < float("inf"))
    steps = tl.div_rn(values, tl.where(usable, scale, 1.0)[:, None])
    steps = tl.where(usable[:, None], steps, 0.0)
    # Clamp first: the rounding trick holds below 2^22 only.
    steps = tl.minimum(tl.maximum(steps, -largest[:, None]), largest[:, None])
    return ((steps + ROUNDER) - ROUNDER).to(tl.int32)


@jit
def _placed(
    tiers_ptr: tl.tensor,
    places_ptr: tl.tensor,
    segments_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    tokens: tl.tensor,
    kv_heads: tl.tensor,
    alignment: tl.constexpr,
    rows: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return this program's tokens, where their states are, their tiers, their rows in the sections, and these."""
    token = tl.program_id(0) * rows + tl.arange(0, rows)
    there = token < tokens
    tier = tl.load(tiers_ptr + token, mask=there, other=TIER_DROP).to(tl.int32)
    segment_ptr = segments_ptr + tl.load(places_ptr + token, mask=there, other=0) * COLUMNS
    body_at = tl.load(segment_ptr + BODY_AT, mask=there, other=0)
    int4 = tl.load(segment_ptr + COUNTS_AT + TIER_INT4, mask=there, other=0)
    int8 = tl.load(segment_ptr + COUNTS_AT + TIER_INT8, mask=there, other=0)
    half = tl.load(segment_ptr + COUNTS_AT + TIER_16BIT, mask=there, other=0)
    own = tl.where(tier == TIER_INT4, int4, tl.where(tier == TIER_INT8, int8, half))
    head = (tl.program_id(2) * kv_heads + tl.program_id(1)).to(tl.int64)
    section_row = head * own + tl.load(places_ptr + tokens + token, mask=there, other=0)
    # Sections begin where those before them end, each as long as it has tokens.
    at_ptr = offsets_ptr + tier * 6
    elements_at = body_at + int4 * tl.load(at_ptr) + int8 * tl.load(at_ptr + 1) + half * tl.load(at_ptr + 2)
    scales_at = body_at + int4 * tl.load(at_ptr + 3) + int8 * tl.load(at_ptr + 4) + half * tl.load(at_ptr + 5)
    states_at = tl.load(segment_ptr + STATES_AT, mask=there, other=0)
    elements_at, scales_at = tl.multiple_of(elements_at, alignment), tl.multiple_of(scales_at, alignment)
    return token, states_at, tier, section_row, elements_at, scales_at


@jit
def _elements(
    states_ptr: tl.tensor,
    stride_head: tl.tensor,
    stride_token: tl.tensor,
    stride_element: tl.tensor,
    token: tl.tensor,
    states_at: tl.tensor,
    half: tl.constexpr,
    padded_half: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return where the tokens' states lie, first and second halves of the head, and the elements of a half."""
    element = tl.arange(0, padded_half)[None, :]
    token_at = states_at + token.to(tl.int64) * stride_token
    low_ptr = states_ptr + tl.program_id(1).to(tl.int64) * stride_head + token_at[:, None]
    low_ptr += element.to(tl.int64) * stride_element
    return low_ptr, low_ptr + tl.cast(half, tl.int64) * stride_element, element


@jit
def encode_rows(
    states_ptr: tl.tensor,
    stride_head: tl.tensor,
    stride_token: tl.tensor,
    stride_element: tl.tensor,
    tiers_ptr: tl.tensor,
    places_ptr: tl.tensor,
    segments_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    floats_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    broken_ptr: tl.tensor,
    tokens: tl.tensor,
    kv_heads: tl.tensor,
    half: tl.constexpr,
    padded_half: tl.constexpr,
    alignment: tl.constexpr,
    rows: tl.constexpr,
) -> None:
    """Code this program's tokens, and write whether all of them fit their tiers."""
    token, states_at, tier, section_row, elements_at, scales_at = _placed(
        tiers_ptr, places_ptr, segments_ptr, offsets_ptr, tokens, kv_heads, alignment, rows
    )
    low_ptr, high_ptr, element = _elements(
        states_ptr, stride_head, stride_token, stride_element, token, states_at, half, padded_half
    )
    is_half, is_int4 = tier == TIER_16BIT, tier == TIER_INT4
    is_coded = is_int4 | (tier == TIER_INT8)
    within = element < half
    mask = (is_half | is_coded)[:, None] & within
    low = tl.load(low_ptr, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(high_ptr, mask=mask, other=0.0).to(tl.float32)
    broken = tl.zeros([rows], tl.int32)
    if tl.max(is_half.to(tl.int32), axis=0) > 0:
        mask = is_half[:, None] & within
        dtype: tl.constexpr = floats_ptr.dtype.element_ty
        float_ptr = floats_ptr + (elements_at // 2)[:, None] + section_row[:, None] * (2 * half) + element
        low_half, high_half = low.to(dtype), high.to(dtype)
        tl.store(float_ptr, low_half, mask=mask)
        tl.store(float_ptr + half, high_half, mask=mask)
        both = tl.maximum(is_broken(low_half), is_broken(high_half))
        broken = tl.where(is_half, tl.max(tl.where(mask, both, 0), axis=1), 0)
    if tl.max(is_coded.to(tl.int32), axis=0) > 0:
        largest = tl.where(is_int4, LARGEST_INT4 * 1.0, LARGEST_INT8 * 1.0)
        scale = _scales(low, high, largest)
        tl.store(scales_ptr + scales_at // 2 + section_row, scale, mask=is_coded)
        broken = tl.where(is_coded, is_broken(scale), broken)
        low_code, high_code = _to_codes(low, scale, largest), _to_codes(high, scale, largest)
        code_ptr = codes_ptr + elements_at[:, None] + section_row[:, None] * (2 * half) + element
        mask = (is_coded & (is_int4 == 0))[:, None] & within
        tl.store(code_ptr, (low_code & 0xFF).to(tl.uint8), mask=mask)
        tl.store(code_ptr + half, (high_code & 0xFF).to(tl.uint8), mask=mask)
        pair_ptr = codes_ptr + elements_at[:, None] + section_row[:, None] * half + element
        pairs = (low_code & 0xF) | ((high_code & 0xF) << 4)
        tl.store(pair_ptr, pairs.to(tl.uint8), mask=is_int4[:, None] & within)
    program = (tl.program_id(0) * kv_heads + tl.program_id(1)) * 2 + tl.program_id(2)
    tl.store(broken_ptr + program, tl.max(broken, axis=0).to(tl.uint8))


@jit
def decode_rows(
    states_ptr: tl.tensor,
    stride_head: tl.tensor,
    stride_token: tl.tensor,
    stride_element: tl.tensor,
    tiers_ptr: tl.tensor,
    places_ptr: tl.tensor,
    segments_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    floats_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    broken_ptr: tl.tensor,
    tokens: tl.tensor,
    kv_heads: tl.tensor,
    half: tl.constexpr,
    padded_half: tl.constexpr,
    alignment: tl.constexpr,
    rows: tl.constexpr,
) -> None:
    """Write this program's tokens, except those that were dropped; `broken_ptr` is not used."""
    token, states_at, tier, section_row, elements_at, scales_at = _placed(
        tiers_ptr, places_ptr, segments_ptr, offsets_ptr, tokens, kv_heads, alignment, rows
    )
    low_ptr, high_ptr, element = _elements(
        states_ptr, stride_head, stride_token, stride_element, token, states_at, half, padded_half
    )
    dtype: tl.constexpr = states_ptr.dtype.element_ty
    is_half, is_int4 = tier == TIER_16BIT, tier == TIER_INT4
    is_coded = is_int4 | (tier == TIER_INT8)
    within = element < half
    if tl.max(is_half.to(tl.int32), axis=0) > 0:
        mask = is_half[:, None] & within
        float_ptr = floats_ptr + (elements_at // 2)[:, None] + section_row[:, None] * (2 * half) + element
        tl.store(low_ptr, tl.load(float_ptr, mask=mask, other=0.0).to(dtype), mask=mask)
        tl.store(high_ptr, tl.load(float_ptr + half, mask=mask, other=0.0).to(dtype), mask=mask)
    if tl.max(is_coded.to(tl.int32), axis=0) > 0:
        scale = tl.load(scales_ptr + scales_at // 2 + section_row, mask=is_coded, other=0.0).to(tl.float32)
        mask = (is_coded & (is_int4 == 0))[:, None] & within
        code_ptr = codes_ptr + elements_at[:, None] + section_row[:, None] * (2 * half) + element
        low_code = tl.load(code_ptr, mask=mask, other=0).to(tl.int32)
        high_code = tl.load(code_ptr + half, mask=mask, other=0).to(tl.int32)
        pair_ptr = codes_ptr + elements_at[:, None] + section_row[:, None] * half + element
        pairs = tl.load(pair_ptr, mask=is_int4[:, None] & within, other=0).to(tl.int32)
        # A code goes to the top of the word, and the arithmetic shift back extends its sign.
        low_code = tl.where(is_int4[:, None], (pairs << 28) >> 28, (low_code << 24) >> 24)
        high_code = tl.where(is_int4[:, None], (pairs << 24) >> 28, (high_code << 24) >> 24)
        mask = is_coded[:, None] & within
        tl.store(low_ptr, to_states(low_code.to(tl.float32) * scale[:, None], dtype), mask=mask)
        tl.store(high_ptr, to_states(high_code.to(tl.float32) * scale[:, None], dtype), mask=mask)


@_jit_for_any_prompt
def absmax_kernel(
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    key_stride_head: tl.tensor,
    key_stride_token: tl.tensor,
    key_stride_element: tl.tensor,
    value_stride_head: tl.tensor,
    value_stride_token: tl.tensor,
    value_stride_element: tl.tensor,
    tiers_ptr: tl.tensor,
    places_ptr: tl.tensor,
    segments_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    floats_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    broken_ptr: tl.tensor,
    tokens: tl.tensor,
    kv_heads: tl.tensor,
    code_rows: tl.constexpr,
    half: tl.constexpr,
    padded_half: tl.constexpr,
    alignment: tl.constexpr,
    rows: tl.constexpr,
) -> None:
    """Run `code_rows`, one of the two above, on this program's side. The grid is (token runs, KV heads, sides)."""
    if tl.program_id(2) == 0:
        code_rows(
            keys_ptr, key_stride_head, key_stride_token, key_stride_element, tiers_ptr, places_ptr, segments_ptr,
            offsets_ptr, floats_ptr, scales_ptr, codes_ptr, broken_ptr, tokens, kv_heads, half, padded_half,
            alignment, rows,
        )  # fmt: skip
    else:
        code_rows(
            values_ptr, value_stride_head, value_stride_token, value_stride_element, tiers_ptr, places_ptr,
            segments_ptr, offsets_ptr, floats_ptr, scales_ptr, codes_ptr, broken_ptr, tokens, kv_heads, half,
            padded_half, alignment, rows,
        )  # fmt: skip
