"""Coefficients to streams of integers and back, compiled for CPUs.

Tokens are sorted by step class, and coefficients lie `[rows, n]`, a row for each element of each head: keys' heads,
then values' heads. So the tokens of one class in one row are neighbours that share a step and a stream, and the loops
over them have no branches: LLVM makes vector instructions of them. Rows whose coefficients have about the same
standard deviation have the same class, and are visited one after another: they are a run. The integers of a run and a
step class go to the stream of the difference of the two classes.
"""

from typing import Any

import numpy as np

from spectrumkv.kernels.jit.compiled import compiled
from spectrumkv.kernels.jit.llvm import greater_magnitude, integer, nearest
from spectrumkv.kernels.spectral import trellis


@compiled
def offsets(row_order: Any, run_start: Any, class_start: Any, stream_of: Any, stream_start: Any, offset: Any) -> None:
    """Find where the integers of each row and step class start.

    Args:
        row_order: int64 `[rows]`, rows sorted by class of standard deviation.
        run_start: int64 `[runs + 1]`, the first index in `row_order` of each run.
        class_start: int64 `[classes + 1]`, the first token of each step class.
        stream_of: int64 `[classes, runs]`.
        stream_start: int64 `[streams]` or longer, where each stream starts among the symbols.
        offset: int64 `[classes, rows]`, written.
    """
    following = stream_start.copy()
    for step_class in range(class_start.size - 1):
        tokens = class_start[step_class + 1] - class_start[step_class]
        for run in range(run_start.size - 1):
            stream = stream_of[step_class, run]
            for index in range(run_start[run], run_start[run + 1]):
                offset[step_class, row_order[index]] = following[stream]
                following[stream] += tokens


@compiled
def quantize(
    coefficients: Any,
    first: int,
    count: int,
    class_start: Any,
    inverse_step: Any,
    offset: Any,
    in_trellis: Any,
    symbols: Any,
) -> Any:
    """Divide some tokens' coefficients by their steps, round, and sort the integers into streams.

    Args:
        coefficients: float32 `[rows or more, count or more]`, tokens sorted by step class.
        first: the first token.
        count: how many tokens.
        class_start: int64 `[classes + 1]`, the first token of each step class.
        inverse_step: float32 `[classes]`.
        offset: int64 `[classes, rows]`; see `offsets`.
        in_trellis: int64 `[rows or more]`, how many of all tokens, the ones of the finest steps, have the coefficient
            quantized in the trellis. Rows are one head's: a token's path leads over them in their order.
        symbols: int32, written.

    Returns:
        The bits of the largest magnitude, int32; where that is 2^31 steps or more, symbols are of no use.
    """
    rows, largest = offset.shape[1], np.int32(0)
    scale, integers = np.empty(count, np.float32), np.empty(count, np.int32)
    costs, states = np.empty((trellis.STATES, count), np.float32), np.empty(count, np.int32)
    choices = np.empty((rows, count), np.uint8)
    _spread(inverse_step, class_start, first, scale)
    trellis.start(costs, count)
    for row in range(rows):
        coded = min(max(in_trellis[row] - first, 0), count)
        largest = trellis.advance(coefficients[row, :coded], scale, costs, choices[row], largest)
    trellis.best(costs, states)
    for row in range(rows - 1, -1, -1):
        coded = min(max(in_trellis[row] - first, 0), count)
        trellis.go_back(coefficients[row, :coded], scale, choices[row], states, integers)
        largest = _round(coefficients[row, coded:count], scale[coded:], integers[coded:], largest)
        for step_class in range(class_start.size - 1):
            begin, end = max(class_start[step_class], first), min(class_start[step_class + 1], first + count)
            if begin < end:
                start = offset[step_class, row] + begin - class_start[step_class]
                _copy(integers[begin - first : end - first], symbols[start:])
    return largest


@compiled
def dequantize(
    symbols: Any,
    first: int,
    count: int,
    class_start: Any,
    step: Any,
    offset: Any,
    in_trellis: Any,
    coefficients: Any,
) -> None:
    """Multiply integers by their steps: what `quantize` did, undone up to its rounding.

    Args:
        symbols: int32, one stream after another.
        first: the first token.
        count: how many tokens.
        class_start: int64 `[classes + 1]`, the first token of each step class.
        step: float32 `[classes]`.
        offset: int64 `[classes, rows]`; see `offsets`.
        in_trellis: see `quantize`.
        coefficients: float32 `[rows or more, count or more]`, written.
    """
    scale, integers, states = np.empty(count, np.float32), np.empty(count, np.int32), np.zeros(count, np.int32)
    _spread(step, class_start, first, scale)
    for row in range(offset.shape[1]):
        for step_class in range(class_start.size - 1):
            begin, end = max(class_start[step_class], first), min(class_start[step_class + 1], first + count)
            if begin < end:
                start = offset[step_class, row] + begin - class_start[step_class]
                _copy(symbols[start : start + end - begin], integers[begin - first :])
        coded = min(max(in_trellis[row] - first, 0), count)
        trellis.dequantize(integers[:coded], scale, states, coefficients[row])
        _multiply(integers[coded:], scale[coded:], coefficients[row, coded:])


# The loops below are functions, since LLVM makes vector instructions of loops over arrays that start at 0.


@compiled
def _spread(of_classes: Any, class_start: Any, first: int, of_tokens: Any) -> None:
    """Write what each of some tokens, from the first one on, has by its step class."""
    for step_class in range(class_start.size - 1):
        begin = max(class_start[step_class] - first, 0)
        end = min(class_start[step_class + 1] - first, of_tokens.size)
        for token in range(begin, end):
            of_tokens[token] = of_classes[step_class]


@compiled
def _round(read: Any, scale: Any, written: Any, largest: Any) -> Any:
    """Round scaled coefficients.

    Returns:
        The bits of the largest magnitude of all coefficients so far.
    """
    for token in range(read.size):
        largest = greater_magnitude(largest, read[token])
        written[token] = integer(nearest(read[token] * scale[token]))
    return largest


@compiled
def _multiply(read: Any, scale: Any, written: Any) -> None:
    """Write integers times their scales."""
    for token in range(read.size):
        written[token] = np.float32(read[token]) * scale[token]


@compiled
def _copy(read: Any, written: Any) -> None:
    """Copy integers."""
    for index in range(read.size):
        written[index] = read[index]
