"""One side of a segment, keys or values, compiled for CPUs: every token at its own tier, into a body and back.

In either direction there is one loop for rows of any kind and one for rows of whole vectors. A single loop with a
branch in it takes 1.4 times as long to code and ten times as long to decode (docs/experiments/absmax-codec.md).
"""

from typing import Any

import numpy as np

from spectrumkv.kernels.absmax.cpu_rows import dequantize_row, quantize_row, row_to_float32, row_to_halves
from spectrumkv.kernels.absmax.cpu_vectors import (
    quantize_int4,
    quantize_int8,
    stream_halves,
    stream_int4,
    stream_int8,
    streamed,
    to_float16,
)
from spectrumkv.kernels.absmax.layout import INT4, INT8, PLACES
from spectrumkv.kernels.jit.compiled import compiled
from spectrumkv.kernels.jit.llvm import to_float32
from spectrumkv.kernels.tiers import TIER_16BIT, TIER_INT4, TIER_INT8

LARGEST_INT8, LARGEST_INT4 = np.float32(INT8.largest), np.float32(INT4.largest)
# numba picks from a tuple of tuples by numbers that it knows, and by no attribute.
FLOATS = PLACES.floats
INT8_CODES, INT8_SCALES = PLACES.coded(INT8)
INT4_CODES, INT4_SCALES = PLACES.coded(INT4)


@compiled
def section_views(body: Any, offsets: Any, shapes: Any) -> Any:
    """Cut a body into its sections; a section may begin at an odd address.

    Args:
        body: uint8 `[b]`.
        offsets: six numbers; see `spectrumkv.kernels.body.BodyLayout`.
        shapes: five tuples, likewise.

    Returns:
        Elements, INT8 scales and INT4 scales as uint16, INT8 codes and INT4 codes as uint8.
    """
    return (
        body[offsets[FLOATS] : offsets[FLOATS + 1]].view(np.uint16).reshape(shapes[FLOATS]),
        body[offsets[INT8_SCALES] : offsets[INT8_SCALES + 1]].view(np.uint16).reshape(shapes[INT8_SCALES]),
        body[offsets[INT4_SCALES] : offsets[INT4_SCALES + 1]].view(np.uint16).reshape(shapes[INT4_SCALES]),
        body[offsets[INT8_CODES] : offsets[INT8_CODES + 1]].reshape(shapes[INT8_CODES]),
        body[offsets[INT4_CODES] : offsets[INT4_CODES + 1]].reshape(shapes[INT4_CODES]),
    )


@compiled
def encode_side(
    states: Any, head_stride: int, token_stride: int, tiers: Any, body: Any, offsets: Any, shapes: Any, side: int
) -> None:
    """Write the keys or the values of a segment into its body, every token at its own tier.

    Args:
        states: all memory of `[heads, n, head_dim]`; see `spectrumkv.kernels.jit.strided.flat`.
        head_stride: elements from head to head.
        token_stride: elements from token to token.
        tiers: uint8 `[n]`.
        body: uint8, written.
        offsets: see `section_views`.
        shapes: see `section_views`.
        side: 0 for keys, 1 for values.
    """
    halves, scales8, scales4, codes8, codes4 = section_views(body, offsets, shapes)
    _, heads, _, head_dim = halves.shape
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
                row_to_halves(row, halves[side, head, n16])
        n4 += tier == TIER_INT4
        n8 += tier == TIER_INT8
        n16 += tier == TIER_16BIT


@compiled
def encode_vectors(
    states: Any, head_stride: int, token_stride: int, tiers: Any, body: Any, offsets: Any, shapes: Any, side: int
) -> None:
    """Do what `encode_side` does, for states that `cpu_vectors.whole_vectors` accepts."""
    halves, scales8, scales4, codes8, codes4 = section_views(body, offsets, shapes)
    _, heads, _, head_dim = halves.shape
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
    body: Any, offsets: Any, shapes: Any, tiers: Any, states: Any, head_stride: int, token_stride: int, side: int
) -> None:
    """Undo `encode_side`, with the same arguments: write `states`, where dropped tokens stay as they are."""
    halves, scales8, scales4, codes8, codes4 = section_views(body, offsets, shapes)
    _, heads, _, head_dim = halves.shape
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
                row_to_float32(halves[side, head, n16], row)
        n4 += tier == TIER_INT4
        n8 += tier == TIER_INT8
        n16 += tier == TIER_16BIT


@compiled
def decode_vectors(
    body: Any, offsets: Any, shapes: Any, tiers: Any, states: Any, head_stride: int, token_stride: int, side: int
) -> None:
    """Do what `decode_side` does, past the cache, for states that `cpu_vectors.streams` accepts."""
    halves, scales8, scales4, codes8, codes4 = section_views(body, offsets, shapes)
    _, heads, _, head_dim = halves.shape
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
