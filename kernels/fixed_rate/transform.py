"""Keys and values to coefficients and back, token by token, compiled for CPUs.

Some tokens are taken at a time, so that what passes from step to step stays in the cache.
"""

from typing import Any

import numpy as np

from spectrumkv.kernels.fixed_rate.records import unpack
from spectrumkv.kernels.jit.compiled import compiled
from spectrumkv.kernels.jit.gemm import multiply_rows
from spectrumkv.kernels.spectral.rows import gather_head, scatter_head

# Tokens at a time: a multiple of `gemm.ROWS`.
TOKENS = 128


@compiled
def analyse(
    keys: Any,
    values: Any,
    order: Any,
    rotation: Any,
    mean: Any,
    analysis: Any,
    scale: Any,
    coefficients: Any,
    energy: Any,
) -> None:
    """Transform keys and values.

    Args:
        keys: float32 memory, elements from head to head, elements from token to token; see `jit.strided.flat`.
        values: like `keys`.
        order: int64 `[n]`, which tokens.
        rotation: cosine and sine, float32 `[m, d / 2]`, of each token's angles, and the factor of a key that is
            turned back.
        mean: float32 `[2 · heads, d]`, keys' heads first.
        analysis: float32 `[2 · heads, d, padded d]`, a column for each coefficient.
        scale: float32 `[2 · heads · d]`, what the energy multiplies coefficients with.
        coefficients: float32 `[n, 2 · heads · d]`, written.
        energy: float32 `[n]`, written: the sum of the squares of a token's scaled coefficients.
    """
    heads, head_dim, padded_dim = analysis.shape
    rows = np.zeros((TOKENS, padded_dim), np.float32)
    product = np.zeros((TOKENS, padded_dim), np.float32)
    power = 1
    while power < head_dim:
        power *= 2
    squares = np.zeros((TOKENS, power), np.float32)
    memory = rows.reshape(rows.size)
    for first in range(0, order.size, TOKENS):
        count = min(TOKENS, order.size - first)
        squares[:] = 0
        for head in range(heads):
            gather_head(keys, values, head, rotation, order, first, count, mean, rows)
            multiply_rows(memory, padded_dim, analysis[head], count, head_dim, product)
            own = slice(head * head_dim, (head + 1) * head_dim)
            keep(product, count, scale[own], coefficients[first : first + count, own], squares)
        add_up(squares, count, energy[first : first + count])


@compiled
def keep(product: Any, count: int, scale: Any, coefficients: Any, squares: Any) -> None:
    """Copy the coefficients of one head, and add their scaled squares to those of the heads before.

    Args:
        product: float32 `[count or more, d or more]`.
        count: how many tokens.
        scale: float32 `[d]`.
        coefficients: float32 `[count, d]`, written.
        squares: float32 `[count or more, d or more]`, added to.
    """
    for token in range(count):
        row, kept, sums = product[token], coefficients[token], squares[token]
        for element in range(scale.size):
            value = row[element]
            kept[element] = value
            scaled = value * scale[element]
            sums[element] += scaled * scaled


@compiled
def add_up(squares: Any, count: int, energy: Any) -> None:
    """Add up the squares of each token, halving rows, so that vectors of any length give the same sums.

    Args:
        squares: float32 `[count or more, p]`, p a power of two; used up.
        count: how many tokens.
        energy: float32 `[count]`, written.
    """
    for token in range(count):
        row, half = squares[token], squares.shape[1] // 2
        while half:
            for element in range(half):
                row[element] += row[half + element]
            half //= 2
        energy[token] = row[0]


@compiled
def moments(coefficients: Any, weights: Any, sums: Any, squares: Any) -> None:
    """Add up coefficients and their squares over the tokens, weighted.

    Args:
        coefficients: float32 `[n, rows]`.
        weights: float32 `[n]`.
        sums: float64 `[rows]`, written.
        squares: float64 `[rows]`, written.
    """
    tokens, rows = coefficients.shape
    sums[:], squares[:] = 0, 0
    some, some_squares = np.empty((2, rows), np.float32)
    for first in range(0, tokens, TOKENS):
        some[:], some_squares[:] = 0, 0
        for token in range(first, min(first + TOKENS, tokens)):
            weight, line = weights[token], coefficients[token]
            for row in range(rows):
                weighted = line[row] * weight
                some[row] += weighted
                some_squares[row] += weighted * line[row]
        for row in range(rows):
            sums[row] += some[row]
            squares[row] += some_squares[row]


@compiled
def synthesise(
    words: Any,
    escape_index: Any,
    escape_value: Any,
    record: Any,
    scales: Any,
    tokens: Any,
    order: Any,
    rotation: Any,
    mean: Any,
    synthesis: Any,
    keys: Any,
    values: Any,
) -> None:
    """Dequantize records and transform them back.

    Args:
        words: uint32, the records.
        escape_index: uint32 `[e]`, rising.
        escape_value: float32 `[e]`.
        record: see `records.unpack`.
        scales: see `records.unpack`.
        tokens: see `records.unpack`.
        order: int64 `[n]`, which tokens of `keys` and `values`.
        rotation: cosine and sine, float32 `[m, d / 2]`, of each token's angles, and the factor of a turned key.
        mean: float32 `[2 · heads, d]`, keys' heads first.
        synthesis: float32 `[2 · heads, d, padded d]`, a row for each coefficient.
        keys: float32 memory, written, elements from head to head, elements from token to token; see
            `jit.strided.flat`.
        values: like `keys`.
    """
    heads, head_dim, padded_dim = synthesis.shape
    width = heads * head_dim
    coefficients = np.zeros((TOKENS, width), np.float32)
    memory = coefficients.reshape(coefficients.size)
    rows = np.zeros((TOKENS, padded_dim), np.float32)
    escape = 0
    for first in range(0, order.size, TOKENS):
        count = min(TOKENS, order.size - first)
        unpack(words, record, scales, tokens, first, count, coefficients)
        while escape < escape_index.size and escape_index[escape] < (first + count) * width:
            memory[escape_index[escape] - first * width] = escape_value[escape]
            escape += 1
        for head in range(heads):
            multiply_rows(memory[head * head_dim :], width, synthesis[head], count, head_dim, rows)
            scatter_head(rows, keys, values, head, rotation, order, first, count, mean)
