"""The loops of the spectral codec on CPUs: coefficients to streams of integers, and back.

Tokens are sorted by step class and coefficients lie `[rows, n]`, a row for each element of each head: keys' heads,
then values' heads. So the tokens of one class in one row are neighbours that share a step and a stream, and the loops
over them have no branches; LLVM makes vector instructions of them. Rows are visited in an order in which those of one
spread class are neighbours (a run); the integers of a run and a step class go to the stream of the difference of the
two classes.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from spectrumkv.kernels.compiled import compiled, intrinsic


@intrinsic
def _nearest(_: Any, value: Any) -> Any:
    """The nearest integer of a float32, halves to even; its magnitude is less than 2^31."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rounded = builder.call(builder.module.declare_intrinsic("llvm.rint", [ir.FloatType()]), arguments)
        return builder.fptosi(rounded, ir.IntType(32))

    return types.int32(types.float32), emit


@compiled
def quantize(
    coefficients: Any,
    row_order: Any,
    run_start: Any,
    class_start: Any,
    inverse_step: Any,
    stream_of: Any,
    position: Any,
    symbols: Any,
) -> None:
    """Divide coefficients by their token's step, round, and sort the integers into streams.

    Args:
        coefficients: float32 `[rows, n]`, tokens sorted by step class; finite, and less than 2^31 steps.
        row_order: int64 `[rows]`, rows sorted by spread class.
        run_start: int64 `[runs + 1]`, the first place in `row_order` of each run.
        class_start: int64 `[classes + 1]`, the first token of each step class.
        inverse_step: float32 `[classes]`.
        stream_of: int64 `[classes, runs]`.
        position: int64 `[streams]`, where each stream starts in `symbols`; moved to its end.
        symbols: int32, written.
    """
    for step_class in range(class_start.size - 1):
        begin, end = class_start[step_class], class_start[step_class + 1]
        scale, tokens = inverse_step[step_class], end - begin
        if tokens == 0:
            continue
        for run in range(run_start.size - 1):
            stream = stream_of[step_class, run]
            for place in range(run_start[run], run_start[run + 1]):
                row = coefficients[row_order[place], begin:end]
                written = symbols[position[stream] : position[stream] + tokens]
                for token in range(tokens):
                    written[token] = _nearest(row[token] * scale)
                position[stream] += tokens


@compiled
def dequantize(
    symbols: Any,
    row_order: Any,
    run_start: Any,
    class_start: Any,
    step: Any,
    stream_of: Any,
    position: Any,
    coefficients: Any,
) -> None:
    """Inverse of `quantize`; `step` is float32 `[classes]`, and every coefficient is written."""
    for step_class in range(class_start.size - 1):
        begin, end = class_start[step_class], class_start[step_class + 1]
        scale, tokens = step[step_class], end - begin
        if tokens == 0:
            continue
        for run in range(run_start.size - 1):
            stream = stream_of[step_class, run]
            for place in range(run_start[run], run_start[run + 1]):
                row = coefficients[row_order[place], begin:end]
                read = symbols[position[stream] : position[stream] + tokens]
                for token in range(tokens):
                    row[token] = np.float32(read[token]) * scale
                position[stream] += tokens
