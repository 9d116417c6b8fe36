"""The spectral codec's transform, compiled for CPUs: keys and values to integers and back.

Some tokens of one head are taken at a time, so that what passes from step to step (rows, coefficients) stays in the
cache.
"""

from typing import Any

import numpy as np

from spectrumkv.kernels.jit.compiled import compiled
from spectrumkv.kernels.jit.gemm import multiply, transpose
from spectrumkv.kernels.spectral.rows import gather_head, scatter_head
from spectrumkv.kernels.spectral.streams import dequantize, quantize

# Tokens at a time. No power of two: rows that far apart would crowd into a few sets of the cache.
TOKENS = 240


@compiled
def analyse(
    keys: Any,
    values: Any,
    order: Any,
    rotation: Any,
    mean: Any,
    analysis: Any,
    class_start: Any,
    inverse_step: Any,
    offset: Any,
    in_trellis: Any,
    symbols: Any,
) -> Any:
    """Transform keys and values and quantize their coefficients.

    Args:
        keys: float32 memory, elements from head to head, elements from token to token; see `jit.strided.flat`.
        values: like `keys`.
        order: int64 `[m]`, tokens by rising step class.
        rotation: cosine and sine, float32 `[n, d / 2]`, of each token's angles, and the factor of a key that is
            turned back.
        mean: float32 `[2 · heads, d]`, keys' heads first.
        analysis: float32 `[2 · heads, d, padded d]`, a column for each coefficient.
        class_start: int64 `[classes + 1]`, the first index in `order` of each step class.
        inverse_step: float32 `[classes]`.
        offset: int64 `[classes, 2 · heads · d]`; see `streams.offsets`.
        in_trellis: int64 `[2 · heads · d]`; see `streams.quantize`.
        symbols: int32, written.

    Returns:
        The bits of the largest magnitude; see `streams.quantize`.
    """
    heads, head_dim, padded_dim = analysis.shape
    rows = np.zeros((TOKENS, padded_dim), np.float32)
    turned = np.zeros((padded_dim, TOKENS), np.float32)
    coefficients = np.zeros((padded_dim, TOKENS), np.float32)
    largest = np.int32(0)
    for head in range(heads):
        own = offset[:, head * head_dim : (head + 1) * head_dim]
        for first in range(0, order.size, TOKENS):
            count = min(TOKENS, order.size - first)
            gather_head(keys, values, head, rotation, order, first, count, mean, rows)
            transpose(rows, count, turned)
            multiply(analysis[head], turned, head_dim, count, coefficients)
            found = quantize(
                coefficients, first, count, class_start, inverse_step, own, in_trellis[head * head_dim :], symbols
            )
            largest = max(largest, found)
    return largest


@compiled
def synthesise(
    symbols: Any,
    order: Any,
    rotation: Any,
    mean: Any,
    synthesis: Any,
    class_start: Any,
    step: Any,
    offset: Any,
    in_trellis: Any,
    keys: Any,
    values: Any,
) -> None:
    """Dequantize coefficients and transform them back.

    Args:
        symbols: int32, one stream after another.
        order: int64 `[m]`, tokens by rising step class.
        rotation: cosine and sine, float32 `[n, d / 2]`, of each token's angles, and the factor of a turned key.
        mean: float32 `[2 · heads, d]`, keys' heads first.
        synthesis: float32 `[2 · heads, d, padded d]`, a row for each coefficient.
        class_start: int64 `[classes + 1]`, the first index in `order` of each step class.
        step: float32 `[classes]`.
        offset: int64 `[classes, 2 · heads · d]`; see `streams.offsets`.
        in_trellis: int64 `[2 · heads · d]`; see `streams.quantize`.
        keys: float32 memory, written, elements from head to head, elements from token to token; see
            `jit.strided.flat`.
        values: like `keys`.
    """
    heads, head_dim, padded_dim = synthesis.shape
    coefficients = np.zeros((padded_dim, TOKENS), np.float32)
    rows = np.zeros((TOKENS, padded_dim), np.float32)
    for head in range(heads):
        own = offset[:, head * head_dim : (head + 1) * head_dim]
        for first in range(0, order.size, TOKENS):
            count = min(TOKENS, order.size - first)
            dequantize(symbols, first, count, class_start, step, own, in_trellis[head * head_dim :], coefficients)
            multiply(coefficients[:head_dim], synthesis[head], count, head_dim, rows)
            scatter_head(rows, keys, values, head, rotation, order, first, count, mean)
