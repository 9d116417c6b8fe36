"""Absmax quantization of rows of float32 that are whole vectors, on CPUs: what the loops of `cpu_rows` do, faster.

Decoded rows are written past the cache: what arrives is more than caches hold, and no step reads it before the whole
prompt is there. Stored the usual way, each line would be read from memory before it is written, and would displace
what running requests have in the cache.
"""

from collections.abc import Callable
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from spectrumkv.kernels.absmax.layout import INT4, INT8
from spectrumkv.kernels.jit.compiled import intrinsic
from spectrumkv.kernels.jit.llvm import (
    F32,
    FLOAT_BYTES,
    HALF,
    I8,
    I16,
    I32,
    I64,
    LANES,
    MAGNITUDE,
    ROUNDER,
    VECTOR,
    load,
    pointer_to,
    splat,
    vector_at,
)

VECTOR_BYTES = LANES * FLOAT_BYTES
# What INT4 packs into one byte lies half a row apart: half a row has whole vectors.
ROW_ELEMENTS = 2 * LANES


def whole_vectors(states: torch.Tensor) -> bool:
    """Return whether rows can be read here: float32 in whole vectors.

    Args:
        states: `[heads, n, d]` on the CPU, the elements of a row side by side.
    """
    return states.dtype == torch.float32 and states.shape[2] % ROW_ELEMENTS == 0


def streams(states: torch.Tensor) -> bool:
    """Return whether rows can be written past the cache: vectors must lie at multiples of their size.

    Args:
        states: `[heads, n, d]` on the CPU, the elements of a row side by side.
    """
    head_stride, token_stride, _ = states.stride()
    distances = (states.data_ptr(), FLOAT_BYTES * head_stride, FLOAT_BYTES * token_stride)
    return whole_vectors(states) and not any(distance % VECTOR_BYTES for distance in distances)


def _each_vector(builder: Any, elements: Any, emit: Callable[[Any], None]) -> None:
    """Emit a loop over the offsets of the vectors of so many elements."""
    with cgutils.for_range(builder, builder.udiv(elements, I64(LANES))) as loop:
        emit(builder.mul(loop.index, I64(LANES)))


def _magnitudes(builder: Any, value: Any) -> Any:
    """Return the bits of |x| for each float of a vector: ordered like floats, with NaN above infinity."""
    kind = ir.VectorType(I32, LANES)
    return builder.and_(builder.bitcast(value, kind), ir.Constant(kind, [MAGNITUDE] * LANES))


def _peak(builder: Any, source: Any, elements: Any) -> Any:
    """Return the greatest magnitude of a row, a float."""
    kind = ir.VectorType(I32, LANES)
    greatest = cgutils.alloca_once_value(builder, ir.Constant(kind, None))

    def look(offset: Any) -> None:
        magnitudes = _magnitudes(builder, load(builder, vector_at(builder, source, offset)))
        known = builder.load(greatest)
        builder.store(builder.select(builder.icmp_signed(">", magnitudes, known), magnitudes, known), greatest)

    _each_vector(builder, elements, look)
    # llvmlite has no name for intrinsics of vectors.
    reduce = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(I32, [kind]), f"llvm.vector.reduce.smax.v{LANES}i32"
    )
    return builder.bitcast(builder.call(reduce, [builder.load(greatest)]), F32)


def _codes(builder: Any, value: Any, divisor: Any, largest: float) -> Any:
    """Return the nearest multiples of the scale, a vector of bytes."""
    steps = builder.fdiv(value, divisor)
    # Clamped first: the rounding holds below 2^22 only.
    for comparison, limit in (("<", largest), (">", -largest)):
        limits = ir.Constant(VECTOR, [limit] * LANES)
        steps = builder.select(builder.fcmp_ordered(comparison, steps, limits), steps, limits)
    rounded = builder.fadd(steps, ir.Constant(VECTOR, [float(ROUNDER)] * LANES))
    bits = builder.bitcast(rounded, ir.VectorType(I32, LANES))
    return builder.trunc(bits, ir.VectorType(I8, LANES))


def _encoder(summary: str, largest: float, packed: bool) -> Callable[..., Any]:
    """Declare an intrinsic that codes one row.

    Args:
        summary: what it does, its docstring.
        largest: the greatest code.
        packed: whether two codes share a byte.

    Returns:
        A function of the states' memory, where the row starts in it, how many elements it has, and the codes, which
        are written; it returns the row's scale as float16's bits.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = pointer_to(context, builder, signature.args[0], *arguments[:2])
        target = pointer_to(context, builder, signature.args[3], arguments[3], I64(0))
        elements = arguments[2]
        scale = builder.fptrunc(builder.fdiv(_peak(builder, source, elements), F32(largest)), HALF)
        divisor = builder.fpext(scale, F32)
        # Dividing by infinity makes the codes of a zero scale zero.
        usable = builder.fcmp_ordered(">", divisor, F32(0.0))
        divisor = splat(builder, builder.select(usable, divisor, F32(float("inf"))))
        half = builder.udiv(elements, I64(2))

        def codes_at(offset: Any) -> Any:
            return _codes(builder, load(builder, vector_at(builder, source, offset)), divisor, largest)

        def code(offset: Any) -> None:
            codes = codes_at(offset)
            if packed:
                nibble = ir.VectorType(I8, LANES)
                low = builder.and_(codes, ir.Constant(nibble, [0xF] * LANES))
                high = builder.shl(codes_at(builder.add(offset, half)), ir.Constant(nibble, [4] * LANES))
                codes = builder.or_(low, high)
            builder.store(codes, vector_at(builder, target, offset, I8)).align = 1

        _each_vector(builder, half if packed else elements, code)
        return builder.bitcast(scale, I16)

    def quantize(_: Any, states: Any, start: Any, elements: Any, codes: Any) -> Any:
        return types.uint16(states, types.int64, types.int64, codes), emit

    quantize.__doc__ = summary
    declared: Callable[..., Any] = intrinsic(quantize)
    return declared


quantize_int8 = _encoder("Code a row at INT8, a byte for each element.", float(INT8.largest), packed=False)
quantize_int4 = _encoder(
    "Code a row at INT4; high nibbles are the row's second half.", float(INT4.largest), packed=True
)


@intrinsic
def to_float16(_: Any, states: Any, start: Any, elements: Any, halves: Any) -> Any:
    """Round a row half to even to float16, or to infinity; `halves` may lie at an odd address.

    Returns:
        The intrinsic's type, and what emits its instructions.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = pointer_to(context, builder, signature.args[0], *arguments[:2])
        target = pointer_to(context, builder, signature.args[3], arguments[3], I64(0))
        target = builder.bitcast(target, HALF.as_pointer())

        def narrow(offset: Any) -> None:
            value = load(builder, vector_at(builder, source, offset))
            narrowed = builder.fptrunc(value, ir.VectorType(HALF, LANES))
            builder.store(narrowed, vector_at(builder, target, offset, HALF)).align = 1

        _each_vector(builder, arguments[2], narrow)
        return context.get_dummy_value()

    return types.void(states, types.int64, types.int64, halves), emit


def _stream(builder: Any, value: Any, pointer: Any) -> None:
    """Store a vector past the cache."""
    stored = builder.store(value, pointer)
    stored.align = VECTOR_BYTES
    stored.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))


def _decoder(summary: str, has_factor: bool, emit_row: Callable[..., None]) -> Callable[..., Any]:
    """Declare an intrinsic that writes one row of the states.

    Args:
        summary: what it does, its docstring.
        has_factor: whether elements are multiplied.
        emit_row: emits the instructions, given the builder, the addresses of the source and of the row, how many
            elements a row has, and the factor in all lanes of a vector.

    Returns:
        A function of the source, a contiguous array, of the states' memory, which is written, of where the row starts
        in it, of how many elements it has, and of the factor if there is one.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = pointer_to(context, builder, signature.args[0], arguments[0], I64(0))
        target = pointer_to(context, builder, signature.args[1], *arguments[1:3])
        factor = splat(builder, arguments[4]) if has_factor else None
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

    def to_float32(offset: Any) -> None:
        loaded = load(builder, vector_at(builder, halves, offset, HALF), alignment=1)
        _stream(builder, builder.fpext(loaded, VECTOR), vector_at(builder, target, offset))

    _each_vector(builder, elements, to_float32)


def _emit_int8(builder: Any, source: Any, target: Any, elements: Any, factor: Any) -> None:
    def multiply(offset: Any) -> None:
        codes = load(builder, vector_at(builder, source, offset, I8), alignment=1)
        value = builder.fmul(builder.sitofp(codes, VECTOR), factor)
        _stream(builder, value, vector_at(builder, target, offset))

    _each_vector(builder, elements, multiply)


def _emit_int4(builder: Any, source: Any, target: Any, elements: Any, factor: Any) -> None:
    half = builder.udiv(elements, I64(2))
    nibble = ir.Constant(ir.VectorType(I8, LANES), [4] * LANES)

    def multiply(offset: Any) -> None:
        codes = load(builder, vector_at(builder, source, offset, I8), alignment=1)
        low, high = builder.ashr(builder.shl(codes, nibble), nibble), builder.ashr(codes, nibble)
        for nibbles, start in ((low, offset), (high, builder.add(offset, half))):
            value = builder.fmul(builder.sitofp(nibbles, VECTOR), factor)
            _stream(builder, value, vector_at(builder, target, start))

    _each_vector(builder, half, multiply)


stream_halves = _decoder("Write float16, which may lie at an odd address, as float32.", False, _emit_halves)
stream_int8 = _decoder("Write INT8 codes, a byte each, times the factor.", True, _emit_int8)
stream_int4 = _decoder("Write INT4 codes times the factor; high nibbles are the row's second half.", True, _emit_int4)


@intrinsic
def streamed(_: Any) -> Any:
    """Emit a fence: other threads see what was streamed before they see what this thread stores afterwards.

    Returns:
        The intrinsic's type, and what emits its instructions.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), emit
