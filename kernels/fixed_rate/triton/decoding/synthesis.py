"""Keys and values of received coefficients in Triton: a tile of tokens in one KV head on one side."""

import triton
import triton.language as tl

from spectrumkv.kernels.triton_shared import Jit, jit, to_states

# What the kernel is told of each tile of tokens of one segment: the layer; how the layer turns keys; the first
# token's position; its line among the coefficients, or minus 1 where the tile has sinks; the 16-bit element of the
# upload at which the segment's sinks are; how many sinks it has; the number of tokens; and the element of the slots
# at which the first token's states are.
TILE_COLUMNS = 8
_COLUMNS, _LAYER, _KIND, _POSITION = tl.constexpr(TILE_COLUMNS), tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_LINE, _SINKS_AT, _SINKS, _TOKENS = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
_STATES = tl.constexpr(7)

# A kernel of its own for each divisor of these would be compiled while a request waits.
_jit_for_any_prompt: Jit = triton.jit(do_not_specialize=["positions"])


@jit
def _load_sinks(
    halves_ptr: tl.tensor,
    tile_ptr: tl.tensor,
    head: tl.tensor,
    token: tl.tensor,
    element: tl.tensor,
    mask: tl.tensor,
    half: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the halves of tokens that came as they are, float32."""
    sinks = tl.load(tile_ptr + _SINKS)
    row_at = tl.load(tile_ptr + _SINKS_AT) + (head * sinks + token) * (2 * half)
    row_ptr = halves_ptr + row_at[:, None] + element[None, :]
    low, high = tl.load(row_ptr, mask=mask, other=0.0), tl.load(row_ptr + half, mask=mask, other=0.0)
    return low.to(tl.float32), high.to(tl.float32)


@jit
def _multiply(
    coefficients_ptr: tl.tensor,
    matrix_ptr: tl.tensor,
    line: tl.tensor,
    there: tl.tensor,
    head: tl.tensor,
    element: tl.tensor,
    heads: tl.constexpr,
    half: tl.constexpr,
    block_tokens: tl.constexpr,
    padded_half: tl.constexpr,
    block_columns: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the halves of the products of tokens' coefficients and a head's matrix, float32."""
    low = tl.zeros([block_tokens, padded_half], tl.float32)
    high = tl.zeros([block_tokens, padded_half], tl.float32)
    for first in range(0, 2 * half, block_columns):
        column = first + tl.arange(0, block_columns)
        inside = column < 2 * half
        line_ptr = coefficients_ptr + line[:, None] * (heads * 2 * half) + (head * (2 * half) + column)[None, :]
        part = tl.load(line_ptr, mask=there[:, None] & inside[None, :], other=0.0)
        row_ptr = matrix_ptr + column[:, None] * (2 * half) + element[None, :]
        mask = inside[:, None] & (element < half)[None, :]
        low = tl.dot(part, tl.load(row_ptr, mask=mask, other=0.0), low, input_precision="tf32x3")
        high = tl.dot(part, tl.load(row_ptr + half, mask=mask, other=0.0), high, input_precision="tf32x3")
    return low, high


@_jit_for_any_prompt
def synthesise_kernel(
    tiles_ptr: tl.tensor,
    halves_ptr: tl.tensor,
    coefficients_ptr: tl.tensor,
    cosine_ptr: tl.tensor,
    sine_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    synthesis_ptr: tl.tensor,
    scaling_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    key_stride_head: tl.tensor,
    key_stride_token: tl.tensor,
    key_stride_element: tl.tensor,
    value_stride_head: tl.tensor,
    value_stride_token: tl.tensor,
    value_stride_element: tl.tensor,
    positions: tl.tensor,
    kv_heads: tl.constexpr,
    half: tl.constexpr,
    padded_half: tl.constexpr,
    block_tokens: tl.constexpr,
    block_columns: tl.constexpr,
) -> None:
    """Write the states of this program's tile into slots. The grid is (tiles, heads of both sides)."""
    head = tl.program_id(1)
    tile_ptr = tiles_ptr + tl.program_id(0).to(tl.int64) * _COLUMNS
    token, element = tl.arange(0, block_tokens), tl.arange(0, padded_half)
    there = token < tl.load(tile_ptr + _TOKENS)
    mask = there[:, None] & (element < half)[None, :]
    line, layer = tl.load(tile_ptr + _LINE), tl.load(tile_ptr + _LAYER)
    if line < 0:
        low, high = _load_sinks(halves_ptr, tile_ptr, head, token, element, mask, half)
    else:
        of_head = layer * (2 * kv_heads) + head
        low, high = _multiply(
            coefficients_ptr, synthesis_ptr + of_head * (4 * half * half), line + token, there, head, element,
            2 * kv_heads, half, block_tokens, padded_half, block_columns,
        )  # fmt: skip
        centre_ptr = mean_ptr + of_head * (2 * half) + element
        low += tl.load(centre_ptr, mask=element < half, other=0.0)[None, :]
        high += tl.load(centre_ptr + half, mask=element < half, other=0.0)[None, :]
        if head < kv_heads:
            position = tl.load(tile_ptr + _KIND) * positions + tl.load(tile_ptr + _POSITION) + token
            angle = position[:, None] * half + element[None, :]
            scaling = tl.load(scaling_ptr + layer)
            cosine = tl.load(cosine_ptr + angle, mask=mask, other=0.0) * scaling
            sine = tl.load(sine_ptr + angle, mask=mask, other=0.0) * scaling
            turned = low * cosine - high * sine
            high = high * cosine + low * sine
            low = turned
    states_at = tl.load(tile_ptr + _STATES)
    if head < kv_heads:
        row_at = states_at + head.to(tl.int64) * key_stride_head + token.to(tl.int64) * key_stride_token
        state_ptr = keys_ptr + row_at[:, None] + element.to(tl.int64)[None, :] * key_stride_element
        tl.store(state_ptr, to_states(low, keys_ptr.dtype.element_ty), mask=mask)
        tl.store(state_ptr + half * key_stride_element, to_states(high, keys_ptr.dtype.element_ty), mask=mask)
    else:
        row_at = states_at + (head - kv_heads).to(tl.int64) * value_stride_head
        row_at += token.to(tl.int64) * value_stride_token
        state_ptr = values_ptr + row_at[:, None] + element.to(tl.int64)[None, :] * value_stride_element
        tl.store(state_ptr, to_states(low, values_ptr.dtype.element_ty), mask=mask)
        tl.store(state_ptr + half * value_stride_element, to_states(high, values_ptr.dtype.element_ty), mask=mask)
