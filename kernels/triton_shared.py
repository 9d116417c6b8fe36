"""What kernels in Triton share: the decorator with a type, and float32 bit by bit, as hosts compute it."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

# Triton ships no types.
Jit = Callable[[Callable[..., Any]], Any]
jit: Jit = triton.jit
ABSOLUTE_BITS, INFINITY_BITS = tl.constexpr(0x7FFFFFFF), tl.constexpr(0x7F800000)
# 1.5 · 2^23: a float32 next to it has no fractional bits, so adding it rounds half to even.
ROUNDER = tl.constexpr(12582912.0)
FLOAT16_MAX = tl.constexpr(torch.finfo(torch.float16).max)


@jit
def magnitude_bits(values: tl.tensor) -> tl.tensor:
    """Return |values| of float32 as int32: ordered like the floats, NaN above infinity, so maxima keep it."""
    return values.to(tl.int32, bitcast=True) & ABSOLUTE_BITS


@jit
def is_broken(values: tl.tensor) -> tl.tensor:
    """Return int32 1 where a number of any float dtype is infinite or NaN."""
    return (magnitude_bits(values.to(tl.float32)) >= INFINITY_BITS).to(tl.int32)


@jit
def to_states(values: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Return float32, rounded to even, in the states' dtype; what was near float16's greatest stays finite."""
    if dtype == tl.float16:
        values = tl.minimum(tl.maximum(values, -FLOAT16_MAX), FLOAT16_MAX)
    elif dtype == tl.bfloat16:
        # Triton's interpreter truncates on the way to bfloat16; after this nothing is left to round.
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        values = bits.to(tl.float32, bitcast=True)
    return values.to(dtype)
