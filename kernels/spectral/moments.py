"""Sums of coefficients and of their squares over some tokens, compiled for CPUs."""

from typing import Any

import numpy as np

from spectrumkv.kernels.jit.compiled import compiled
from spectrumkv.kernels.jit.gemm import multiply, transpose
from spectrumkv.kernels.spectral.rows import gather_head
from spectrumkv.kernels.spectral.transform import TOKENS


@compiled
def add_moments(
    keys: Any, values: Any, order: Any, rotation: Any, mean: Any, analysis: Any, sums: Any, squares: Any
) -> None:
    """Transform keys and values of some tokens and add up each coefficient and its square.

    Args:
        keys: float32 memory, elements from head to head, elements from token to token; see `jit.strided.flat`.
        values: like `keys`.
        order: int64 `[m]`, the tokens, at most `TOKENS`.
        rotation: see `transform.analyse`.
        mean: float32 `[2 · heads, d]`, keys' heads first.
        analysis: float32 `[2 · heads, d, padded d]`, a column for each coefficient.
        sums: float64 `[2 · heads, d]`, written.
        squares: like `sums`.
    """
    heads, head_dim, padded_dim = analysis.shape
    rows = np.zeros((TOKENS, padded_dim), np.float32)
    turned = np.zeros((padded_dim, TOKENS), np.float32)
    coefficients = np.zeros((padded_dim, TOKENS), np.float32)
    count = order.size
    for head in range(heads):
        gather_head(keys, values, head, rotation, order, 0, count, mean, rows)
        transpose(rows, count, turned)
        multiply(analysis[head], turned, head_dim, count, coefficients)
        for row in range(head_dim):
            line = coefficients[row, :count]
            total, energy = 0.0, 0.0
            for token in range(count):
                coefficient = np.float64(line[token])
                total += coefficient
                energy += coefficient * coefficient
            sums[head, row], squares[head, row] = total, energy
