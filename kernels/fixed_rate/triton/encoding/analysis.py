"""Coefficients of a layer in Triton: a tile of tokens in one KV head on one side is turned back and multiplied."""

import triton
import triton.language as tl

from spectrumkv.kernels.fixed_rate.triton.encoding.segments import HEADER_BYTES as _HEADER_BYTES
from spectrumkv.kernels.fixed_rate.triton.encoding.segments import segment_of
from spectrumkv.kernels.triton_shared import Jit, jit

HEADER_BYTES = tl.constexpr(_HEADER_BYTES)

# A kernel of its own for each divisor of these would be compiled while a request waits.
_jit_for_any_prompt: Jit = triton.jit(
    do_not_specialize=["tokens", "size", "sinks", "own_tokens", "body_bytes", "counters"]
)


@jit
def _load_halves(
    states_ptr: tl.tensor,
    stride_head: tl.tensor,
    stride_token: tl.tensor,
    stride_element: tl.tensor,
    head: tl.tensor,
    token: tl.tensor,
    there: tl.tensor,
    half: tl.constexpr,
    padded_half: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the first and the second half of tokens' elements as float32."""
    element = tl.arange(0, padded_half)[None, :]
    mask = there[:, None] & (element < half)
    row_ptr = states_ptr + head.to(tl.int64) * stride_head + token.to(tl.int64)[:, None] * stride_token
    low = tl.load(row_ptr + element * stride_element, mask=mask, other=0.0)
    high = tl.load(row_ptr + (element + half) * stride_element, mask=mask, other=0.0)
    return low.to(tl.float32), high.to(tl.float32)


@jit
def _store_sinks(
    halves_ptr: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    token: tl.tensor,
    head: tl.tensor,
    tokens: tl.tensor,
    size: tl.tensor,
    sinks: tl.tensor,
    body_bytes: tl.tensor,
    half: tl.constexpr,
    padded_half: tl.constexpr,
) -> None:
    """Write the elements of first tokens as they are into the bodies of their segments."""
    number = token // size
    first, own_sinks, _ = segment_of(number, tokens, size, sinks)
    row = head * own_sinks + token - first
    row_at = number.to(tl.int64) * (body_bytes // 2) + HEADER_BYTES // 2 + row * (2 * half)
    element = tl.arange(0, padded_half)[None, :]
    mask = ((token < sinks) & (token < tokens))[:, None] & (element < half)
    row_ptr = halves_ptr + row_at[:, None] + element
    tl.store(row_ptr, low.to(halves_ptr.dtype.element_ty), mask=mask)
    tl.store(row_ptr + half, high.to(halves_ptr.dtype.element_ty), mask=mask)


@_jit_for_any_prompt
def analyse_kernel(
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    key_stride_head: tl.tensor,
    key_stride_token: tl.tensor,
    key_stride_element: tl.tensor,
    value_stride_head: tl.tensor,
    value_stride_token: tl.tensor,
    value_stride_element: tl.tensor,
    cosine_ptr: tl.tensor,
    sine_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    analysis_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    coefficients_ptr: tl.tensor,
    energies_ptr: tl.tensor,
    halves_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    tokens: tl.tensor,
    size: tl.tensor,
    sinks: tl.tensor,
    own_tokens: tl.tensor,
    body_bytes: tl.tensor,
    counters: tl.tensor,
    inverse_scaling: tl.tensor,
    kv_heads: tl.constexpr,
    half: tl.constexpr,
    padded_half: tl.constexpr,
    block_tokens: tl.constexpr,
    block_columns: tl.constexpr,
) -> None:
    """Transform this program's tokens. The grid is (tiles of tokens, heads of both sides)."""
    head = tl.program_id(1)
    token = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    there = token < tokens
    element = tl.arange(0, padded_half)
    inside = element < half
    if head < kv_heads:
        low, high = _load_halves(
            keys_ptr, key_stride_head, key_stride_token, key_stride_element, head, token, there, half, padded_half
        )
    else:
        low, high = _load_halves(
            values_ptr, value_stride_head, value_stride_token, value_stride_element, head - kv_heads, token, there,
            half, padded_half,
        )  # fmt: skip
    if tl.program_id(0) * block_tokens < sinks:
        _store_sinks(
            halves_ptr, low, high, token, head, tokens, size, sinks, body_bytes, half, padded_half
        )  # fmt: skip
    if head < kv_heads:
        angle = token.to(tl.int64)[:, None] * half + element[None, :]
        mask = there[:, None] & inside[None, :]
        cosine = tl.load(cosine_ptr + angle, mask=mask, other=0.0) * inverse_scaling
        sine = tl.load(sine_ptr + angle, mask=mask, other=0.0) * inverse_scaling
        turned = low * cosine + high * sine
        high = high * cosine - low * sine
        low = turned
    mean_ptr += head * (2 * half) + element
    low -= tl.load(mean_ptr, mask=inside, other=0.0)[None, :]
    high -= tl.load(mean_ptr + half, mask=inside, other=0.0)[None, :]
    energy = tl.zeros([block_tokens], tl.float32)
    for first in range(0, 2 * half, block_columns):
        column = first + tl.arange(0, block_columns)
        mask = inside[:, None] & (column < 2 * half)[None, :]
        matrix_ptr = analysis_ptr + (head * (2 * half) + element)[:, None] * (2 * half) + column[None, :]
        product = tl.dot(low, tl.load(matrix_ptr, mask=mask, other=0.0), input_precision="tf32x3")
        below = tl.load(matrix_ptr + half * (2 * half), mask=mask, other=0.0)
        product = tl.dot(high, below, product, input_precision="tf32x3")
        row = head * (2 * half) + column
        scaled = product * tl.load(scale_ptr + row, mask=column < 2 * half, other=0.0)[None, :]
        energy += tl.sum(scaled * scaled, axis=1)
        line_ptr = coefficients_ptr + token.to(tl.int64)[:, None] * (2 * kv_heads * 2 * half) + row[None, :]
        tl.store(line_ptr, product, mask=there[:, None] & (column < 2 * half)[None, :])
    tl.store(energies_ptr + head.to(tl.int64) * tokens + token, energy, mask=there)
    if (tl.program_id(0) == 0) & (head == 0):
        # The next launches count the programs that are done.
        for at in range(0, counters, block_tokens):
            counter = at + tl.arange(0, block_tokens)
            tl.store(counters_ptr + counter, tl.zeros([block_tokens], tl.int32), mask=counter < counters)
