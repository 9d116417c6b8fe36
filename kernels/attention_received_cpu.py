"""Attention that tokens receive, on CPUs: a matrix product for each KV head, then one compiled pass over its logits.

Softmax, mask and sum over queries take three loops over a row while it is in the first-level cache, where torch's
operations each go through all rows. Nothing is masked: a row's loops run over what its query sees.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from spectrumkv.kernels.compiled import compiled

# 1.5 · 2^23: adding it to a float32 rounds that half to even, and leaves the integer in the low bits of the sum.
ROUNDER = np.float32(12582912)
LEAST_EXPONENT = np.float32(-126)
# Coefficients of x^0 … x^6 in 2^x; between -1/2 and 1/2 the next one comes to 10^-7.
P0, P1, P2, P3, P4, P5, P6 = (np.float32(math.log(2) ** i / math.factorial(i)) for i in range(7))
ONE = np.float32(1)
LONG = ir.IntType(32)

# numba ships no types.
_intrinsic: Callable[..., Any] = intrinsic


def attention_received(
    queries: torch.Tensor, keys: torch.Tensor, window: int, sliding_window: int | None, softcap: float | None
) -> torch.Tensor:
    """See `spectrumkv.kernels.attention_received`."""
    kv_heads, tokens, _ = keys.shape
    received = torch.zeros(kv_heads, tokens)
    logits = torch.empty(queries.shape[1], tokens)
    for head in range(kv_heads):
        torch.mm(queries[head], keys[head].float().t(), out=logits)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        _add_weights(logits.numpy(), window, min(sliding_window or tokens, tokens), received[head].numpy())
    return received


def prepare() -> None:
    """Compile, or load what an earlier process compiled."""
    attention_received(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), 1, None, None)


@_intrinsic
def _greater(_: Any, known: Any, value: Any) -> Any:
    """The greater one of two floats of which the first is given as `_float_of` wants it; NaN is above infinity."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # Flipping the magnitude of negative floats makes their bits ordered like the floats themselves.
        bits = builder.bitcast(arguments[1], LONG)
        bits = builder.xor(bits, builder.and_(builder.ashr(bits, LONG(31)), LONG(0x7FFFFFFF)))
        return builder.select(builder.icmp_signed(">", bits, arguments[0]), bits, arguments[0])

    return types.int32(types.int32, types.float32), emit


@_intrinsic
def _float_of(_: Any, ordered: Any) -> Any:
    """The float that `_greater` found."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flipped = builder.and_(builder.ashr(arguments[0], LONG(31)), LONG(0x7FFFFFFF))
        return builder.bitcast(builder.xor(arguments[0], flipped), ir.FloatType())

    return types.float32(types.int32), emit


@_intrinsic
def _two_to_the(_: Any, rounded: Any) -> Any:
    """2^k, of k + `ROUNDER`, for -126 ≤ k ≤ 127."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        exponent = builder.shl(builder.bitcast(arguments[0], LONG), LONG(23))
        return builder.bitcast(builder.add(exponent, LONG(127 << 23)), ir.FloatType())

    return types.float32(types.float32), emit


@_intrinsic
def _plus(_: Any, total: Any, value: Any) -> Any:
    """A sum that may be taken in any order, which lets the loop around it be vectorized."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments, flags=("reassoc",))

    return types.float32(types.float32, types.float32), emit


@compiled
def _add_weights(logits: Any, window: int, sliding_window: int, received: Any) -> None:
    """Add to `received` `[n]` the softmax of each row of `logits` `[g · w, n]`, which are overwritten."""
    rows, tokens = logits.shape
    base = np.float32(1.4426950408889634)
    for i in range(rows):
        end = tokens - window + i % window + 1
        first = max(0, end - sliding_window)
        row, target = logits[i, first:end], received[first:end]
        peak = np.int32(-0x80000000)
        for j in range(row.size):
            peak = _greater(peak, row[j])
        greatest = _float_of(peak)
        total = np.float32(0)
        for j in range(row.size):
            power = (row[j] - greatest) * base
            power = power if not power < LEAST_EXPONENT else LEAST_EXPONENT
            rounded = power + ROUNDER
            x = power - (rounded - ROUNDER)
            weight = P0 + x * (P1 + x * (P2 + x * (P3 + x * (P4 + x * (P5 + x * P6)))))
            row[j] = weight * _two_to_the(rounded)
            total = _plus(total, row[j])
        share = ONE / total
        for j in range(row.size):
            target[j] += row[j] * share
