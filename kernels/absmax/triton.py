"""Absmax quantization in Triton: one launch for any mix of tiers, one pass over the elements, gather and scatter too.

A program codes a tile (see `tiles`), a few tokens of one tier, in one KV head. It takes the first and the second half
of the head apart, since two elements half a head apart share a byte of INT4. All arithmetic is in float32 and rounds
as the reference does.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from spectrumkv.kernels import tiers as tier_codes
from spectrumkv.kernels.absmax import layout, tiles

# Elements of one program: enough to keep 128 threads busy, few enough to stay in registers.
TILE_ELEMENTS = 2048

COLUMNS = tl.constexpr(tiles.TILE_COLUMNS)
TIER, ORDER_START = tl.constexpr(tiles.TIER), tl.constexpr(tiles.ORDER_START)
ROWS, ROW, SECTION_ROWS = tl.constexpr(tiles.ROWS), tl.constexpr(tiles.ROW), tl.constexpr(tiles.SECTION_ROWS)
ELEMENTS_AT, SCALES_AT = tl.constexpr(tiles.ELEMENTS_AT), tl.constexpr(tiles.SCALES_AT)
TIER_16BIT, TIER_INT8 = tl.constexpr(tier_codes.TIER_16BIT), tl.constexpr(tier_codes.TIER_INT8)
LARGEST_INT8, LARGEST_INT4 = tl.constexpr(layout.INT8.largest), tl.constexpr(layout.INT4.largest)
ABSOLUTE_BITS = tl.constexpr(0x7FFFFFFF)
# 1.5 · 2^23: a float32 next to it has no fractional bits, so adding it rounds half to even.
ROUNDER = tl.constexpr(12582912.0)
FLOAT16_MAX = tl.constexpr(layout.FLOAT16_MAX)

# Triton ships no types.
_jit: Callable[[Callable[..., Any]], Any] = triton.jit


@_jit
def _magnitude_bits(values: tl.tensor) -> tl.tensor:
    """Return |values| as int32: ordered like the floats, with NaN above infinity, so that a maximum keeps NaN."""
    return values.to(tl.int32, bitcast=True) & ABSOLUTE_BITS


@_jit
def _scales(low: tl.tensor, high: tl.tensor, largest: tl.constexpr, rows: tl.constexpr) -> tl.tensor:
    """Return float16 `[rows]`: the greatest magnitude of each row over the greatest code."""
    magnitude = tl.maximum(_magnitude_bits(low), _magnitude_bits(high))
    absmax = tl.max(magnitude, axis=1).to(tl.float32, bitcast=True)
    return tl.div_rn(absmax, tl.full([rows], largest, tl.float32)).to(tl.float16)


@_jit
def _to_codes(values: tl.tensor, scale: tl.tensor, largest: tl.constexpr) -> tl.tensor:
    """Return the nearest multiples of the float16 scale as int32, 0 where the scale is 0, infinite or NaN."""
    scale = scale.to(tl.float32)
    usable = (scale > 0.0) & (scale < float("inf"))
    steps = tl.div_rn(values, tl.where(usable, scale, 1.0)[:, None])
    steps = tl.where(usable[:, None], steps, 0.0)
    # Clamp first: the rounding trick holds below 2^22 only.
    steps = tl.minimum(tl.maximum(steps, -largest * 1.0), largest * 1.0)
    return ((steps + ROUNDER) - ROUNDER).to(tl.int32)


@_jit
def _to_states(codes: tl.tensor, scale: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Return codes times scale, rounded to nearest even in the states' dtype."""
    values = codes.to(tl.float32) * scale[:, None]
    if dtype == tl.float16:
        values = tl.minimum(tl.maximum(values, -FLOAT16_MAX), FLOAT16_MAX)
    elif dtype == tl.bfloat16:
        # Triton's interpreter truncates on the way to bfloat16; after this nothing is left to round.
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        values = bits.to(tl.float32, bitcast=True)
    return values.to(dtype)


@_jit
def _tile(
    order_ptr: tl.tensor, tiles_ptr: tl.tensor, kv_heads: tl.tensor, alignment: tl.constexpr, rows: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return this program's tier, tokens, their mask, their rows in the sections, and where the sections begin."""
    table = tiles_ptr + tl.program_id(0) * COLUMNS
    tier = tl.load(table + TIER)
    order_start = tl.load(table + ORDER_START)
    row = tl.arange(0, rows)
    in_tile = row < tl.load(table + ROWS)
    token = tl.load(order_ptr + order_start + row, mask=in_tile, other=0).to(tl.int64)
    head = tl.program_id(2) * kv_heads + tl.program_id(1)
    section_row = head.to(tl.int64) * tl.load(table + SECTION_ROWS) + tl.load(table + ROW) + row
    elements_at = tl.multiple_of(tl.load(table + ELEMENTS_AT), alignment)
    scales_at = tl.multiple_of(tl.load(table + SCALES_AT), alignment)
    return tier, token, in_tile, section_row, elements_at, scales_at


@_jit
def _elements(
    states_ptr: tl.tensor,
    stride_head: tl.tensor,
    stride_token: tl.tensor,
    stride_element: tl.tensor,
    token: tl.tensor,
    in_tile: tl.tensor,
    half: tl.constexpr,
    padded_half: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return where the tile's states lie, first and second halves of the head, elements of a half, and their mask."""
    element = tl.arange(0, padded_half)[None, :]
    mask = in_tile[:, None] & (element < half)
    low_ptr = states_ptr + tl.program_id(1).to(tl.int64) * stride_head + token[:, None] * stride_token
    low_ptr += element.to(tl.int64) * stride_element
    return low_ptr, low_ptr + tl.cast(half, tl.int64) * stride_element, element, mask


@_jit
def _encode_tile(
    states_ptr: tl.tensor,
    stride_head: tl.tensor,
    stride_token: tl.tensor,
    stride_element: tl.tensor,
    order_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    floats_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    kv_heads: tl.tensor,
    half: tl.constexpr,
    padded_half: tl.constexpr,
    alignment: tl.constexpr,
    rows: tl.constexpr,
) -> None:
    tier, token, in_tile, section_row, elements_at, scales_at = _tile(order_ptr, tiles_ptr, kv_heads, alignment, rows)
    low_ptr, high_ptr, element, mask = _elements(
        states_ptr, stride_head, stride_token, stride_element, token, in_tile, half, padded_half
    )
    low = tl.load(low_ptr, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(high_ptr, mask=mask, other=0.0).to(tl.float32)
    if tier == TIER_16BIT:
        float_ptr = floats_ptr + elements_at // 2 + section_row[:, None] * (2 * half) + element
        dtype: tl.constexpr = floats_ptr.dtype.element_ty
        tl.store(float_ptr, low.to(dtype), mask=mask)
        tl.store(float_ptr + half, high.to(dtype), mask=mask)
    elif tier == TIER_INT8:
        scale = _scales(low, high, LARGEST_INT8, rows)
        tl.store(scales_ptr + scales_at // 2 + section_row, scale, mask=in_tile)
        code_ptr = codes_ptr + elements_at + section_row[:, None] * (2 * half) + element
        tl.store(code_ptr, (_to_codes(low, scale, LARGEST_INT8) & 0xFF).to(tl.uint8), mask=mask)
        tl.store(code_ptr + half, (_to_codes(high, scale, LARGEST_INT8) & 0xFF).to(tl.uint8), mask=mask)
    else:
        scale = _scales(low, high, LARGEST_INT4, rows)
        tl.store(scales_ptr + scales_at // 2 + section_row, scale, mask=in_tile)
        pairs = (_to_codes(low, scale, LARGEST_INT4) & 0xF) | ((_to_codes(high, scale, LARGEST_INT4) & 0xF) << 4)
        tl.store(codes_ptr + elements_at + section_row[:, None] * half + element, pairs.to(tl.uint8), mask=mask)


@_jit
def _decode_tile(
    states_ptr: tl.tensor,
    stride_head: tl.tensor,
    stride_token: tl.tensor,
    stride_element: tl.tensor,
    order_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    floats_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    kv_heads: tl.tensor,
    half: tl.constexpr,
    padded_half: tl.constexpr,
    alignment: tl.constexpr,
    rows: tl.constexpr,
) -> None:
    tier, token, in_tile, section_row, elements_at, scales_at = _tile(order_ptr, tiles_ptr, kv_heads, alignment, rows)
    low_ptr, high_ptr, element, mask = _elements(
        states_ptr, stride_head, stride_token, stride_element, token, in_tile, half, padded_half
    )
    dtype: tl.constexpr = states_ptr.dtype.element_ty
    if tier == TIER_16BIT:
        float_ptr = floats_ptr + elements_at // 2 + section_row[:, None] * (2 * half) + element
        tl.store(low_ptr, tl.load(float_ptr, mask=mask, other=0.0).to(dtype), mask=mask)
        tl.store(high_ptr, tl.load(float_ptr + half, mask=mask, other=0.0).to(dtype), mask=mask)
    else:
        scale = tl.load(scales_ptr + scales_at // 2 + section_row, mask=in_tile, other=0.0).to(tl.float32)
        # A code goes to the top of the word, and the arithmetic shift back extends its sign.
        if tier == TIER_INT8:
            code_ptr = codes_ptr + elements_at + section_row[:, None] * (2 * half) + element
            low = (tl.load(code_ptr, mask=mask, other=0).to(tl.int32) << 24) >> 24
            high = (tl.load(code_ptr + half, mask=mask, other=0).to(tl.int32) << 24) >> 24
            tl.store(low_ptr, _to_states(low, scale, dtype), mask=mask)
            tl.store(high_ptr, _to_states(high, scale, dtype), mask=mask)
        else:
            pair_ptr = codes_ptr + elements_at + section_row[:, None] * half + element
            pairs = tl.load(pair_ptr, mask=mask, other=0).to(tl.int32)
            tl.store(low_ptr, _to_states((pairs << 28) >> 28, scale, dtype), mask=mask)
            tl.store(high_ptr, _to_states((pairs << 24) >> 28, scale, dtype), mask=mask)


@_jit
def _kernel(
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    key_stride_head: tl.tensor,
    key_stride_token: tl.tensor,
    key_stride_element: tl.tensor,
    value_stride_head: tl.tensor,
    value_stride_token: tl.tensor,
    value_stride_element: tl.tensor,
    order_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    floats_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    kv_heads: tl.tensor,
    code_tile: tl.constexpr,
    half: tl.constexpr,
    padded_half: tl.constexpr,
    alignment: tl.constexpr,
    rows: tl.constexpr,
) -> None:
    """Run `code_tile`, one of the two above, on this program's side. The grid is (tiles, KV heads, sides)."""
    if tl.program_id(2) == 0:
        code_tile(
            keys_ptr, key_stride_head, key_stride_token, key_stride_element, order_ptr, tiles_ptr, floats_ptr,
            scales_ptr, codes_ptr, kv_heads, half, padded_half, alignment, rows,
        )  # fmt: skip
    else:
        code_tile(
            values_ptr, value_stride_head, value_stride_token, value_stride_element, order_ptr, tiles_ptr, floats_ptr,
            scales_ptr, codes_ptr, kv_heads, half, padded_half, alignment, rows,
        )  # fmt: skip


def encode(
    keys: torch.Tensor, values: torch.Tensor, tiers: torch.Tensor, boundaries: Sequence[int], bodies: torch.Tensor
) -> None:
    """Code segments of tokens; see `dispatch.encode`. CPU tensors work under `TRITON_INTERPRET=1` only."""
    encoding(keys, values, tiers, boundaries, bodies)()


def decode(
    bodies: torch.Tensor, tiers: torch.Tensor, boundaries: Sequence[int], keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Write the tokens of segments; see `dispatch.decode`. CPU tensors work under `TRITON_INTERPRET=1` only."""
    decoding(bodies, tiers, boundaries, keys, values)()


def encoding(
    keys: torch.Tensor, values: torch.Tensor, tiers: torch.Tensor, boundaries: Sequence[int], bodies: torch.Tensor
) -> Callable[[], None]:
    """Return what runs `encode` with these arguments: one launch and nothing else, as CUDA graphs want it."""
    return _prepared(_encode_tile, keys, values, tiers, boundaries, bodies)


def decoding(
    bodies: torch.Tensor, tiers: torch.Tensor, boundaries: Sequence[int], keys: torch.Tensor, values: torch.Tensor
) -> Callable[[], None]:
    """Return what runs `decode` with these arguments; see `encoding`."""
    return _prepared(_decode_tile, keys, values, tiers, boundaries, bodies)


def _prepared(
    code_tile: Any,
    keys: torch.Tensor,
    values: torch.Tensor,
    tiers: torch.Tensor,
    boundaries: Sequence[int],
    bodies: torch.Tensor,
) -> Callable[[], None]:
    """Return what runs `code_tile` on every tile, KV head and side."""
    kv_heads, _, head_dim = keys.shape
    padded_half: int = triton.next_power_of_2(head_dim // 2)
    rows = max(1, TILE_ELEMENTS // (2 * padded_half))
    table = tiles.tiles_of_segments(tiers.numpy(), boundaries, kv_heads, head_dim, rows)
    half = torch.float16 if keys.dtype == torch.float32 else keys.dtype
    floats, scales = bodies.view(half), bodies.view(torch.float16)
    order, rows_of_tiles = table.on(keys.device)

    def launch() -> None:
        if not len(table.tiles):
            return
        with torch.cuda.device(keys.get_device()):
            _kernel[len(table.tiles), kv_heads, 2](
                keys,
                values,
                *keys.stride(),
                *values.stride(),
                order,
                rows_of_tiles,
                floats,
                scales,
                bodies,
                kv_heads,
                code_tile=code_tile,
                half=head_dim // 2,
                padded_half=padded_half,
                # Every section has a length that both of these divide, so that each begins at a multiple of them.
                alignment=math.gcd(16, (4 if head_dim % 4 == 0 else 2) * kv_heads),
                rows=rows,
            )

    return launch
