"""One side of a segment, keys or values, compiled for CPUs: every token at its own tier, into a body and back.

There is a loop for rows of any kind and one for rows of whole vectors, in either direction: as one with a branch it
takes 1.4 times as long to code and ten times as long to decode (docs/experiments/absmax-codec.md).
"""

from typing import Any

import numpy as np

from spectrumkv.kernels.absmax.cpu_rows import dequantize_row, element, quantize_row, sixteen_bits
from spectrumkv.kernels.absmax.cpu_vectors import (
    quantize_int4,
    quantize_int8,
    stream_halves,
    stream_int4,
    stream_int8,
    streamed,
    to_float16,
)
from spectrumkv.kernels.absmax.layout import TIER_16BIT, TIER_INT4, TIER_INT8
from spectrumkv.kernels.jit.compiled import compiled
from spectrumkv.kernels.jit.float_bits import to_float32

LARGEST_INT8, LARGEST_INT4 = np.float32(127), np.float32(7)


@compiled
def count_tiers(tiers: Any) -> Any:
    """How many tokens are at 16 bits, at INT8 and at INT4."""
    n16, n8, n4 = 0, 0, 0
    for tier in tiers:
        n16 += tier == TIER_16BIT
        n8 += tier == TIER_INT8
        n4 += tier == TIER_INT4
    return n16, n8, n4


@compiled
def body_parts(body: Any, tiers: Any, heads: int, head_dim: int) -> Any:
    """The sections of a body, in the order of `Parts`, wherever they lie: odd addresses are no matter."""
    n16, n8, n4 = count_tiers(tiers)
    scales8 = 4 * heads * n16 * head_dim
    scales4 = scales8 + 4 * heads * n8
    codes8 = scales4 + 4 * heads * n4
    codes4 = codes8 + 2 * heads * n8 * head_dim
    return (
        body[:scales8].view(np.uint16).reshape((2, heads, n16, head_dim)),
        body[scales8:scales4].view(np.uint16).reshape((2, heads, n8)),
        body[scales4:codes8].view(np.uint16).reshape((2, heads, n4)),
        body[codes8:codes4].reshape((2, heads, n8, head_dim)),
        body[codes4:].reshape((2, heads, n4, head_dim // 2)),
    )


@compiled
def encode_side(
    states: Any, head_stride: int, token_stride: int, tiers: Any, heads: int, head_dim: int, body: Any, side: int
) -> None:
    """Write the keys (side 0) or the values (1) of a segment into its body, every token at its own tier."""
    halves, scales8, scales4, codes8, codes4 = body_parts(body, tiers, heads, head_dim)
    n16, n8, n4 = 0, 0, 0
    for token in range(tiers.size):
        tier = tiers[token]
        # Head by head within a token: so models lay them out, and the branches on a tier are fewer.
        for head in range(heads):
            start = head * head_stride + token * token_stride
            row = states[start : start + head_dim]
            if tier == TIER_INT4:
                scales4[side, head, n4] = quantize_row(row, codes4[side, head, n4], LARGEST_INT4, True)
            elif tier == TIER_INT8:
                scales8[side, head, n8] = quantize_row(row, codes8[side, head, n8], LARGEST_INT8, False)
            elif tier == TIER_16BIT:
                target = halves[side, head, n16]
                for i in range(head_dim):
                    target[i] = sixteen_bits(row[i])
        n4 += tier == TIER_INT4
        n8 += tier == TIER_INT8
        n16 += tier == TIER_16BIT


@compiled
def encode_vectors(
    states: Any, head_stride: int, token_stride: int, tiers: Any, heads: int, head_dim: int, body: Any, side: int
) -> None:
    """`encode_side`, for states that `absmax_vectors.whole_vectors` accepts."""
    halves, scales8, scales4, codes8, codes4 = body_parts(body, tiers, heads, head_dim)
    n16, n8, n4 = 0, 0, 0
    for token in range(tiers.size):
        tier = tiers[token]
        for head in range(heads):
            start = head * head_stride + token * token_stride
            if tier == TIER_INT4:
                scales4[side, head, n4] = quantize_int4(states, start, head_dim, codes4[side, head, n4])
            elif tier == TIER_INT8:
                scales8[side, head, n8] = quantize_int8(states, start, head_dim, codes8[side, head, n8])
            elif tier == TIER_16BIT:
                to_float16(states, start, head_dim, halves[side, head, n16])
        n4 += tier == TIER_INT4
        n8 += tier == TIER_INT8
        n16 += tier == TIER_16BIT


@compiled
def decode_side(
    body: Any, tiers: Any, heads: int, head_dim: int, states: Any, head_stride: int, token_stride: int, side: int
) -> None:
    """Inverse of `encode_side`; dropped tokens stay as they are."""
    halves, scales8, scales4, codes8, codes4 = body_parts(body, tiers, heads, head_dim)
    n16, n8, n4 = 0, 0, 0
    for token in range(tiers.size):
        tier = tiers[token]
        for head in range(heads):
            start = head * head_stride + token * token_stride
            row = states[start : start + head_dim]
            if tier == TIER_INT4:
                dequantize_row(codes4[side, head, n4], scales4[side, head, n4], row, True)
            elif tier == TIER_INT8:
                dequantize_row(codes8[side, head, n8], scales8[side, head, n8], row, False)
            elif tier == TIER_16BIT:
                source = halves[side, head, n16]
                for i in range(head_dim):
                    row[i] = element(source[i], row)
        n4 += tier == TIER_INT4
        n8 += tier == TIER_INT8
        n16 += tier == TIER_16BIT


@compiled
def decode_vectors(
    body: Any, tiers: Any, heads: int, head_dim: int, states: Any, head_stride: int, token_stride: int, side: int
) -> None:
    """`decode_side` past the cache, for states that `absmax_vectors.streams` accepts."""
    halves, scales8, scales4, codes8, codes4 = body_parts(body, tiers, heads, head_dim)
    n16, n8, n4 = 0, 0, 0
    for token in range(tiers.size):
        tier = tiers[token]
        for head in range(heads):
            start = head * head_stride + token * token_stride
            if tier == TIER_INT4:
                stream_int4(codes4[side, head, n4], states, start, head_dim, to_float32(scales4[side, head, n4]))
            elif tier == TIER_INT8:
                stream_int8(codes8[side, head, n8], states, start, head_dim, to_float32(scales8[side, head, n8]))
            elif tier == TIER_16BIT:
                stream_halves(halves[side, head, n16], states, start, head_dim)
        n4 += tier == TIER_INT4
        n8 += tier == TIER_INT8
        n16 += tier == TIER_16BIT
    streamed()
