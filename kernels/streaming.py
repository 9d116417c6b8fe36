"""Rows of the slots written past the cache, on CPUs.

What arrives is more than caches hold and is read in a later step at the earliest. Stored the usual way, each line
would be read from memory before it is written, and what running streams had in the cache would go.
"""

from collections.abc import Callable
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from spectrumkv.kernels.compiled import intrinsic
from spectrumkv.kernels.vectors import (
    FLOAT_BYTES,
    LANES,
    LONG,
    PLACE,
    VECTOR,
    everywhere,
    load,
    pointer_to,
    vector_at,
)

BYTE, HALF = ir.IntType(8), ir.HalfType()
VECTOR_BYTES = LANES * FLOAT_BYTES
# What INT4 packs into one byte lies half a row apart: half a row has whole vectors.
ROW_ELEMENTS = 2 * LANES


def streams(states: torch.Tensor) -> bool:
    """Whether rows of `[heads, n, d]` can be written past the cache: float32 in whole vectors, on the CPU.

    Args:
        states: the elements of a row side by side.
    """
    head_stride, token_stride, _ = states.stride()
    return (
        states.dtype == torch.float32
        and states.shape[2] % ROW_ELEMENTS == 0
        and not any(offset % VECTOR_BYTES for offset in (states.data_ptr(), 4 * head_stride, 4 * token_stride))
    )


def _stream(builder: Any, value: Any, pointer: Any) -> None:
    """Store a vector past the cache."""
    stored = builder.store(value, pointer)
    stored.align = VECTOR_BYTES
    stored.set_metadata("nontemporal", builder.module.add_metadata([LONG(1)]))


def _each_vector(builder: Any, elements: Any, emit: Callable[[Any], None]) -> None:
    """Emit a loop over the offsets of the vectors of so many elements."""
    with cgutils.for_range(builder, builder.udiv(elements, PLACE(LANES))) as loop:
        emit(builder.mul(loop.index, PLACE(LANES)))


def _row_intrinsic(summary: str, has_factor: bool, emit_row: Callable[..., None]) -> Callable[..., Any]:
    """Declare what writes one row past the cache.

    Args:
        summary: what it does, its docstring.
        has_factor: whether elements are multiplied.
        emit_row: emits it, given the builder, the addresses of the source and of the row, how many elements a row has
            and the factor in all lanes of a vector.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = pointer_to(context, builder, signature.args[0], arguments[0], PLACE(0))
        target = pointer_to(context, builder, signature.args[1], *arguments[1:3])
        factor = everywhere(builder, arguments[4]) if has_factor else None
        emit_row(builder, source, target, arguments[3], factor)
        return context.get_dummy_value()

    def plain(_: Any, source: Any, states: Any, start: Any, elements: Any) -> Any:
        return types.void(source, states, types.int64, types.int64), emit

    def scaled(_: Any, source: Any, states: Any, start: Any, elements: Any, factor: Any) -> Any:
        return types.void(source, states, types.int64, types.int64, types.float32), emit

    typed = scaled if has_factor else plain
    typed.__doc__ = summary
    declared: Callable[..., Any] = intrinsic(typed)
    return declared


def _emit_halves(builder: Any, source: Any, target: Any, elements: Any, _: Any) -> None:
    halves = builder.bitcast(source, HALF.as_pointer())

    def widen(offset: Any) -> None:
        loaded = load(builder, vector_at(builder, halves, offset, HALF), alignment=1)
        _stream(builder, builder.fpext(loaded, VECTOR), vector_at(builder, target, offset))

    _each_vector(builder, elements, widen)


def _emit_int8(builder: Any, source: Any, target: Any, elements: Any, factor: Any) -> None:
    def multiply(offset: Any) -> None:
        codes = load(builder, vector_at(builder, source, offset, BYTE), alignment=1)
        value = builder.fmul(builder.sitofp(codes, VECTOR), factor)
        _stream(builder, value, vector_at(builder, target, offset))

    _each_vector(builder, elements, multiply)


def _emit_int4(builder: Any, source: Any, target: Any, elements: Any, factor: Any) -> None:
    half = builder.udiv(elements, PLACE(2))
    nibble = ir.Constant(ir.VectorType(BYTE, LANES), [4] * LANES)

    def multiply(offset: Any) -> None:
        codes = load(builder, vector_at(builder, source, offset, BYTE), alignment=1)
        low, high = builder.ashr(builder.shl(codes, nibble), nibble), builder.ashr(codes, nibble)
        for nibbles, place in ((low, offset), (high, builder.add(offset, half))):
            value = builder.fmul(builder.sitofp(nibbles, VECTOR), factor)
            _stream(builder, value, vector_at(builder, target, place))

    _each_vector(builder, half, multiply)


# Each takes the row's source, a contiguous array; the states' memory, where the row starts in it, and how many
# elements it has; and the factor.
stream_halves = _row_intrinsic("Widen float16, which may lie at an odd address.", False, _emit_halves)
stream_int8 = _row_intrinsic("Multiply INT8 codes, a byte each.", True, _emit_int8)
stream_int4 = _row_intrinsic("Multiply INT4 codes; high nibbles are the row's second half.", True, _emit_int4)


@intrinsic
def streamed(_: Any) -> Any:
    """Wait until what was streamed can be seen by others: such stores are not ordered with what follows them."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), emit
