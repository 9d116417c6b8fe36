"""Absmax quantization in Triton: one pass over the elements, gather and scatter included.

A program takes a few tokens of one KV head as two tiles, the first and the second half of the head, since two
elements that far apart share a byte of INT4. All arithmetic is in float32 and rounds as the reference does.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from spectrumkv.kernels.absmax_format import INT8, CodeFormat, check_arguments

# Elements of one program: enough to keep 128 threads busy, few enough to stay in registers.
TILE_ELEMENTS = 2048

ABSOLUTE_BITS = tl.constexpr(0x7FFFFFFF)
# 1.5 · 2^23: a float32 next to it has no fractional bits, so adding it rounds half to even.
ROUNDER = tl.constexpr(12582912.0)
FLOAT16_MAX = tl.constexpr(65504.0)

# Triton ships no types.
_jit: Callable[[Callable[..., Any]], Any] = triton.jit


@_jit
def _rows_and_elements(
    index_ptr: tl.tensor, tokens: tl.tensor, half: tl.tensor, rows: tl.constexpr, padded_half: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Which rows of codes, tokens of the states and elements of a half head this program works on."""
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    element = tl.arange(0, padded_half)
    token = tl.load(index_ptr + row, mask=row < tokens, other=0)
    mask = (row < tokens)[:, None] & (element < half)[None, :]
    return row, token, element, mask


@_jit
def _magnitude_bits(values: tl.tensor) -> tl.tensor:
    """|values| as int32: ordered like the floats, with NaN above infinity, so that a maximum keeps NaN."""
    return values.to(tl.int32, bitcast=True) & ABSOLUTE_BITS


@_jit
def _to_codes(values: tl.tensor, scale: tl.tensor, largest: tl.constexpr) -> tl.tensor:
    """Nearest multiples of the scale as int32, 0 where the scale is 0, infinite or NaN."""
    usable = (scale > 0.0) & (scale < float("inf"))
    steps = tl.div_rn(values, tl.where(usable, scale, 1.0)[:, None])
    steps = tl.where(usable[:, None], steps, 0.0)
    # Clamp first: the rounding trick holds below 2^22 only.
    steps = tl.minimum(tl.maximum(steps, -largest * 1.0), largest * 1.0)
    return ((steps + ROUNDER) - ROUNDER).to(tl.int32)


@_jit
def _quantize_kernel(
    states_ptr: tl.tensor,
    index_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    tokens: tl.tensor,
    half: tl.tensor,
    stride_head: tl.tensor,
    stride_token: tl.tensor,
    stride_element: tl.tensor,
    largest: tl.constexpr,
    packed: tl.constexpr,
    rows: tl.constexpr,
    padded_half: tl.constexpr,
) -> None:
    row, token, element, mask = _rows_and_elements(index_ptr, tokens, half, rows, padded_half)
    head = tl.program_id(1).to(tl.int64)
    low_ptr = states_ptr + head * stride_head + token[:, None] * stride_token
    low_ptr += element[None, :].to(tl.int64) * stride_element
    high_ptr = low_ptr + tl.cast(half, tl.int64) * stride_element
    low = tl.load(low_ptr, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(high_ptr, mask=mask, other=0.0).to(tl.float32)

    magnitude = tl.maximum(_magnitude_bits(low), _magnitude_bits(high))
    absmax = tl.max(magnitude, axis=1).to(tl.float32, bitcast=True)
    scale = tl.div_rn(absmax, tl.full([rows], largest, tl.float32)).to(tl.float16)
    code_row = head * tokens + row
    tl.store(scales_ptr + code_row, scale, mask=row < tokens)

    low_codes = _to_codes(low, scale.to(tl.float32), largest)
    high_codes = _to_codes(high, scale.to(tl.float32), largest)
    if packed:
        pairs = (low_codes & 0xF) | ((high_codes & 0xF) << 4)
        tl.store(codes_ptr + code_row[:, None] * half + element[None, :], pairs.to(tl.uint8), mask=mask)
    else:
        code_ptr = codes_ptr + code_row[:, None] * (2 * half) + element[None, :]
        tl.store(code_ptr, low_codes.to(tl.int8), mask=mask)
        tl.store(code_ptr + half, high_codes.to(tl.int8), mask=mask)


@_jit
def _to_states(codes: tl.tensor, scale: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Codes times scale, rounded to nearest even in the states' dtype."""
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
def _dequantize_kernel(
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    index_ptr: tl.tensor,
    states_ptr: tl.tensor,
    tokens: tl.tensor,
    half: tl.tensor,
    stride_head: tl.tensor,
    stride_token: tl.tensor,
    stride_element: tl.tensor,
    packed: tl.constexpr,
    rows: tl.constexpr,
    padded_half: tl.constexpr,
) -> None:
    row, token, element, mask = _rows_and_elements(index_ptr, tokens, half, rows, padded_half)
    head = tl.program_id(1).to(tl.int64)
    code_row = head * tokens + row
    scale = tl.load(scales_ptr + code_row, mask=row < tokens, other=0.0).to(tl.float32)
    if packed:
        pairs = tl.load(codes_ptr + code_row[:, None] * half + element[None, :], mask=mask, other=0)
        pairs = pairs.to(tl.int32)
        # The nibble goes to the top of the word, and the arithmetic shift back extends its sign.
        low_codes = (pairs << 28) >> 28
        high_codes = (pairs << 24) >> 28
    else:
        code_ptr = codes_ptr + code_row[:, None] * (2 * half) + element[None, :]
        low_codes = tl.load(code_ptr, mask=mask, other=0).to(tl.int32)
        high_codes = tl.load(code_ptr + half, mask=mask, other=0).to(tl.int32)

    low_ptr = states_ptr + head * stride_head + token[:, None] * stride_token
    low_ptr += element[None, :].to(tl.int64) * stride_element
    high_ptr = low_ptr + tl.cast(half, tl.int64) * stride_element
    dtype: tl.constexpr = states_ptr.dtype.element_ty
    tl.store(low_ptr, _to_states(low_codes, scale, dtype), mask=mask)
    tl.store(high_ptr, _to_states(high_codes, scale, dtype), mask=mask)


def quantize(
    states: torch.Tensor, index: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, form: CodeFormat
) -> None:
    """See `spectrumkv.kernels.absmax.quantize`. CPU tensors work under `TRITON_INTERPRET=1` only."""
    check_arguments(states, index, codes, scales, form)
    if not codes.numel():
        return
    half, tile, grid = _launch(states, index)
    with torch.cuda.device(states.get_device()):
        _quantize_kernel[grid](
            states,
            index,
            codes,
            scales,
            index.shape[0],
            half,
            *states.stride(),
            largest=form.largest,
            packed=form != INT8,
            **tile,
        )


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, index: torch.Tensor, states: torch.Tensor, form: CodeFormat
) -> None:
    """See `spectrumkv.kernels.absmax.dequantize`. CPU tensors work under `TRITON_INTERPRET=1` only."""
    check_arguments(states, index, codes, scales, form)
    if not codes.numel():
        return
    half, tile, grid = _launch(states, index)
    with torch.cuda.device(states.get_device()):
        _dequantize_kernel[grid](
            codes,
            scales,
            index,
            states,
            index.shape[0],
            half,
            *states.stride(),
            packed=form != INT8,
            **tile,
        )


def _launch(states: torch.Tensor, index: torch.Tensor) -> tuple[int, dict[str, int], tuple[int, int]]:
    """Half the head dimension, the tile's constants, and the grid."""
    kv_heads, _, head_dim = states.shape
    half = head_dim // 2
    padded_half: int = triton.next_power_of_2(half)
    rows = max(1, TILE_ELEMENTS // (2 * padded_half))
    return half, {"rows": rows, "padded_half": padded_half}, (triton.cdiv(index.shape[0], rows), kv_heads)
