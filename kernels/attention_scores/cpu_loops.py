"""Attention compiled for CPUs: what decoding one token and scoring a prompt have in common, and each on top of it."""

import math
from typing import Any

import numpy as np
from numba import types

from spectrumkv.kernels.jit.compiled import compiled, intrinsic
from spectrumkv.kernels.jit.float_bits import ROUNDER, bfloat16, to_float32
from spectrumkv.kernels.jit.gemm import ROWS, weigh
from spectrumkv.kernels.jit.machine_types import F32, I32
from spectrumkv.kernels.jit.row_dots import dot_rows

LEAST_EXPONENT = np.float32(-126)
LOG2_E = np.float32(math.log2(math.e))
# Coefficients of x^0 … x^6 in 2^x; between -1/2 and 1/2 the next one comes to 10^-7.
P0, P1, P2, P3, P4, P5, P6 = (np.float32(math.log(2) ** i / math.factorial(i)) for i in range(7))
ZERO, ONE = np.float32(0), np.float32(1)


@intrinsic
def _greater(_: Any, known: Any, value: Any) -> Any:
    """The greater one of two floats of which the first is given as `_float_of` wants it; NaN is above infinity."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # Flipping the magnitude of negative floats makes their bits ordered like the floats themselves.
        bits = builder.bitcast(arguments[1], I32)
        bits = builder.xor(bits, builder.and_(builder.ashr(bits, I32(31)), I32(0x7FFFFFFF)))
        return builder.select(builder.icmp_signed(">", bits, arguments[0]), bits, arguments[0])

    return types.int32(types.int32, types.float32), emit


@intrinsic
def _float_of(_: Any, ordered: Any) -> Any:
    """The float that `_greater` found."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flipped = builder.and_(builder.ashr(arguments[0], I32(31)), I32(0x7FFFFFFF))
        return builder.bitcast(builder.xor(arguments[0], flipped), F32)

    return types.float32(types.int32), emit


@intrinsic
def _two_to_the(_: Any, rounded: Any) -> Any:
    """2^k, of k + `ROUNDER`, for -126 ≤ k ≤ 127."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        exponent = builder.shl(builder.bitcast(arguments[0], I32), I32(23))
        return builder.bitcast(builder.add(exponent, I32(127 << 23)), F32)

    return types.float32(types.float32), emit


@intrinsic
def _plus(_: Any, total: Any, value: Any) -> Any:
    """A sum that may be taken in any order, which lets the loop around it be vectorized."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments, flags=("reassoc",))

    return types.float32(types.float32, types.float32), emit


@compiled
def centre(keys: Any, head_stride: int, token_stride: int, stride: int, centred: Any) -> None:
    """Take from keys, head by head, the mean of every `stride`th token.

    Args:
        keys: float32, all memory of `[heads, n, d]`, see `spectrumkv.kernels.strided.flat`.
        head_stride: elements from head to head.
        token_stride: elements from token to token.
        stride: from 1.
        centred: int16 `[heads, n, d]`, written: bfloat16's bits.
    """
    heads, tokens, head_dim = centred.shape
    mean = np.empty(head_dim, np.float32)
    share = ONE / np.float32((tokens + stride - 1) // stride)
    for head in range(heads):
        mean[:] = ZERO
        for token in range(0, tokens, stride):
            start = head * head_stride + token * token_stride
            key = keys[start : start + head_dim]
            for j in range(head_dim):
                mean[j] += key[j] * share
        for token in range(tokens):
            start = head * head_stride + token * token_stride
            key, row = keys[start : start + head_dim], centred[head, token]
            for j in range(head_dim):
                row[j] = bfloat16(key[j] - mean[j])


@compiled
def exponentials(logits: Any, weights: Any) -> Any:
    """Write e^(x - the greatest x) of each x; return one divided by their sum. Two loops over a row in the cache.

    Args:
        logits: float32 `[n]`, or int16 for bfloat16, of which numba has no type.
        weights: float32 `[n]`, written; another array, or the loop would not become one of vectors.
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


@compiled
def add_weights(logits: Any, window: int, sliding_window: int, received: Any) -> None:
    """Add up for each head the softmax of its rows. Nothing is masked: loops over a row run over what its query sees.

    Args:
        logits: `[heads, g · w, n]`, of a type that `exponentials` takes.
        window: w, how many of the last positions ask.
        sliding_window: how many of the newest tokens a query sees.
        received: float32 `[heads, n]`, added to.
    """
    heads, rows, tokens = logits.shape
    weights = np.empty(tokens, np.float32)
    for head in range(heads):
        for i in range(rows):
            end = tokens - window + i % window + 1
            first = max(0, end - sliding_window)
            row, target = weights[first:end], received[head, first:end]
            share = exponentials(logits[head, i, first:end], row)
            for j in range(row.size):
                target[j] += row[j] * share


@compiled
def attend(queries: Any, keys: Any, values: Any, firsts: Any, ends: Any, scaling: float, attended: Any) -> None:
    """Attention of one query for each row of a batch over its run of slots.

    Args:
        queries: float32 `[batch, kv_heads, g, head_dim]`, head_dim a multiple of `small_products.COLUMNS`.
        keys: float32 `[kv_heads, slots, head_dim]`, contiguous.
        values: like `keys`.
        firsts: int64 `[batch]`, the first slot that a row sees.
        ends: int64 `[batch]`, one past the last.
        scaling: factor of the logits, float32.
        attended: written, like `queries`.
    """
    batch, kv_heads, group, head_dim = queries.shape
    longest, members = (ends - firsts).max(), (group + ROWS - 1) // ROWS * ROWS
    asking, sums = np.empty((members, head_dim), np.float32), np.empty((members, head_dim), np.float32)
    # Weights of members that there are not stay 0.
    logits, weights = np.empty((members, longest), np.float32), np.zeros((members, longest), np.float32)
    shares = np.empty(group, np.float32)
    for row in range(batch):
        tokens = ends[row] - firsts[row]
        for head in range(kv_heads):
            start = (head * keys.shape[1] + firsts[row]) * head_dim
            for member in range(group):
                for i in range(head_dim):
                    asking[member, i] = queries[row, head, member, i] * scaling
            dot_rows(asking, group, keys, start, tokens, logits)
            for member in range(group):
                shares[member] = exponentials(logits[member, :tokens], weights[member, :tokens])
            weigh(weights, values, start, tokens, sums)
            for member in range(group):
                target = attended[row, head, member]
                for i in range(head_dim):
                    target[i] = sums[member, i] * shares[member]
