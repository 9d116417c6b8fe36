"""The softmax of one row of logits, compiled for CPUs: decoding a token and scoring a prompt both call it."""

import math
from typing import Any

import numpy as np
from numba import types

from spectrumkv.kernels.jit.compiled import compiled, intrinsic
from spectrumkv.kernels.jit.llvm import F32, I32, ROUNDER, to_float32

LEAST_EXPONENT = np.float32(-126)
LOG2_E = np.float32(math.log2(math.e))
# Coefficients of x^0 … x^6 in 2^x; between -1/2 and 1/2 the next one comes to 10^-7.
P0, P1, P2, P3, P4, P5, P6 = (np.float32(math.log(2) ** i / math.factorial(i)) for i in range(7))
ZERO, ONE = np.float32(0), np.float32(1)


@intrinsic
def _greater(_: Any, known: Any, value: Any) -> Any:
    """Return the greater one of a float in the order of `_float_of` and a float; NaN is above infinity."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # Flipping the magnitude of negative floats makes their bits ordered like the floats themselves.
        bits = builder.bitcast(arguments[1], I32)
        bits = builder.xor(bits, builder.and_(builder.ashr(bits, I32(31)), I32(0x7FFFFFFF)))
        return builder.select(builder.icmp_signed(">", bits, arguments[0]), bits, arguments[0])

    return types.int32(types.int32, types.float32), emit


@intrinsic
def _float_of(_: Any, ordered: Any) -> Any:
    """Return the float that `_greater` found."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flipped = builder.and_(builder.ashr(arguments[0], I32(31)), I32(0x7FFFFFFF))
        return builder.bitcast(builder.xor(arguments[0], flipped), F32)

    return types.float32(types.int32), emit


@intrinsic
def _two_to_the(_: Any, rounded: Any) -> Any:
    """Return 2^k for a float that is k + `ROUNDER`, -126 ≤ k ≤ 127."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        exponent = builder.shl(builder.bitcast(arguments[0], I32), I32(23))
        return builder.bitcast(builder.add(exponent, I32(127 << 23)), F32)

    return types.float32(types.float32), emit


@intrinsic
def _plus(_: Any, total: Any, value: Any) -> Any:
    """Return a sum that LLVM may take in any order, so that it can make vectors of the loop around it."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments, flags=("reassoc",))

    return types.float32(types.float32, types.float32), emit


@compiled
def exponentials(logits: Any, weights: Any) -> Any:
    """Write e^(x - the greatest x) of each x, in two loops over a row that is in the cache.

    Args:
        logits: float32 `[n]`, or int16 for bfloat16, of which numba has no type.
        weights: float32 `[n]`, written; another array than `logits`, or LLVM would make no vectors of the loop.

    Returns:
        One divided by the sum of the weights, float32: times this the weights are the softmax.
    """
    peak = np.int32(-0x80000000)
    for i in range(logits.size):
        peak = _greater(peak, to_float32(logits[i]))
    greatest = _float_of(peak)
    total = ZERO
    for i in range(logits.size):
        power = (to_float32(logits[i]) - greatest) * LOG2_E
        # Written so that NaN stays.
        power = power if not power < LEAST_EXPONENT else LEAST_EXPONENT
        rounded = power + ROUNDER
        x = power - (rounded - ROUNDER)
        weight = P0 + x * (P1 + x * (P2 + x * (P3 + x * (P4 + x * (P5 + x * P6)))))
        weights[i] = weight * _two_to_the(rounded)
        total = _plus(total, weights[i])
    return ONE / total
