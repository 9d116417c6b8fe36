"""Where the parts of a layer's bodies lie on the GPU, for the host and for kernels.

A layer is cut into segments of as many tokens, the last one shorter. Their bodies lie at multiples of a number of
bytes, since what each takes is known only once it is packed.
"""

from dataclasses import dataclass

import triton.language as tl

from spectrumkv.kernels.triton_shared import jit

HEADER_BYTES = 16
# What is found out about a layer: scores that are not finite, the base, the drift of standard deviations, and the
# smoothed base.
FOUND_BROKEN, FOUND_BASE, FOUND_DRIFT, FOUND_SMOOTH, FOUND_SEGMENTS = 0, 1, 2, 3, 4
# And about each segment: words of records, escapes, the exponent of the largest standard deviation, what is not
# finite.
SEGMENT_COLUMNS = 4
SEGMENT_WORDS, SEGMENT_ESCAPES, SEGMENT_TOP, SEGMENT_BROKEN = 0, 1, 2, 3

_HEADER = tl.constexpr(HEADER_BYTES)


@dataclass(frozen=True)
class SegmentShape:
    """How a layer is cut into segments.

    Attributes:
        tokens: of the layer.
        size: tokens of a segment.
        sinks: how many of the first tokens are sent without the transform.
        own_tokens: from so many coded tokens on, a segment has scales of its own.
        body_bytes: room for a body, a multiple of 16.
    """

    tokens: int
    size: int
    sinks: int
    own_tokens: int
    body_bytes: int

    @property
    def segments(self) -> int:
        """Count the segments."""
        return -(-self.tokens // self.size)

    def fixed_bytes(self, rows: int) -> int:
        """Return the most bytes that a body has before its records; kernels look at room for what follows only.

        Args:
            rows: coefficients of a token.
        """
        length = min(self.size, self.tokens)
        scales = 2 * rows if length >= self.own_tokens else 0
        return HEADER_BYTES + 2 * rows * min(self.sinks, length) + scales + length + 3

    @property
    def scalars(self) -> tuple[int, ...]:
        """Return what kernels are told, in the order of their arguments."""
        return self.tokens, self.size, self.sinks, self.own_tokens, self.body_bytes


@jit
def segment_of(
    number: tl.tensor, tokens: tl.tensor, size: tl.tensor, sinks: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return a segment's first token, its sinks, and how many tokens are coded."""
    first = number * size
    length = tl.minimum(tokens - first, size)
    own_sinks = tl.minimum(tl.maximum(sinks - first, 0), length)
    return first, own_sinks, length - own_sinks


@jit
def scales_at(own_sinks: tl.tensor, rows: tl.constexpr) -> tl.tensor:
    """Return the byte of a body at which its scales begin, if it has its own."""
    return own_sinks * (2 * rows) + _HEADER


@jit
def tokens_at(own_sinks: tl.tensor, count: tl.tensor, own_tokens: tl.tensor, rows: tl.constexpr) -> tl.tensor:
    """Return the byte of a body at which the bytes of its tokens begin."""
    return scales_at(own_sinks, rows) + tl.where(count >= own_tokens, 2 * rows, 0)


@jit
def words_at(own_sinks: tl.tensor, count: tl.tensor, own_tokens: tl.tensor, rows: tl.constexpr) -> tl.tensor:
    """Return the 32-bit word of a body at which its records begin."""
    return (tokens_at(own_sinks, count, own_tokens, rows) + count + 3) // 4
