"""Coefficients to streams of integers and back, compiled for CPUs.

Tokens are sorted by step class, and coefficients lie `[rows, n]`, a row for each element of each head: keys' heads,
then values' heads. So the tokens of one class in one row are neighbours that share a step and a stream, and the loops
over them have no branches: LLVM makes vector instructions of them. Rows whose coefficients have about the same
standard deviation have the same class, and are visited one after another: they are a run. The integers of a run and a
step class go to the stream of the difference of the two classes.
"""

from typing import Any

import numpy as np
from numba import types

from spectrumkv.kernels.jit.compiled import compiled, intrinsic
from spectrumkv.kernels.jit.llvm import F32, I32, greater_magnitude


@intrinsic
def _nearest(_: Any, value: Any) -> Any:
    """Return the nearest integer of a float32, halves to even; any number where its magnitude is 2^31 or more."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rounded = builder.call(builder.module.declare_intrinsic("llvm.rint", [F32]), arguments)
        return builder.fptosi(rounded, I32)

    return types.int32(types.float32), emit


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
    coefficients: Any, first: int, count: int, class_start: Any, inverse_step: Any, offset: Any, symbols: Any
) -> Any:
    """Divide some tokens' coefficients by their steps, round, and sort the integers into streams.

    Args:
        coefficients: float32 `[rows or more, count or more]`, tokens sorted by step class.
        first: the first token.
        count: how many tokens.
        class_start: int64 `[classes + 1]`, the first token of each step class.
        inverse_step: float32 `[classes]`.
        offset: int64 `[classes, rows]`; see `offsets`.
        symbols: int32, written.

    Returns:
        The bits of the largest magnitude, int32; where that is 2^31 steps or more, symbols are of no use.
    """
    largest = np.int32(0)
    for step_class in range(class_start.size - 1):
        begin, end = max(class_start[step_class], first), min(class_start[step_class + 1], first + count)
        if begin >= end:
            continue
        scale, skipped, tokens = inverse_step[step_class], begin - class_start[step_class], end - begin
        for row in range(offset.shape[1]):
            start = offset[step_class, row] + skipped
            read, written = coefficients[row, begin - first : end - first], symbols[start : start + tokens]
            for token in range(tokens):
                largest = greater_magnitude(largest, read[token])
                written[token] = _nearest(read[token] * scale)
    return largest


@compiled
def dequantize(
    symbols: Any, first: int, count: int, class_start: Any, step: Any, offset: Any, coefficients: Any
) -> None:
    """Multiply integers by their steps: what `quantize` did, undone up to its rounding.

    Args:
        symbols: int32, one stream after another.
        first: the first token.
        count: how many tokens.
        class_start: int64 `[classes + 1]`, the first token of each step class.
        step: float32 `[classes]`.
        offset: int64 `[classes, rows]`; see `offsets`.
        coefficients: float32 `[rows or more, count or more]`, written.
    """
    for step_class in range(class_start.size - 1):
        begin, end = max(class_start[step_class], first), min(class_start[step_class + 1], first + count)
        if begin >= end:
            continue
        scale, skipped, tokens = step[step_class], begin - class_start[step_class], end - begin
        for row in range(offset.shape[1]):
            start = offset[step_class, row] + skipped
            written, read = coefficients[row, begin - first : end - first], symbols[start : start + tokens]
            for token in range(tokens):
                written[token] = np.float32(read[token]) * scale
