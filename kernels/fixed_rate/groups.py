"""Cells and bit planes of a group of rows, in the vectors of the processor at hand.

A word of a plane is a comparison of vectors, whose outcome is a bit a lane, and a table of 32 entries fits two
vectors of AVX-512. Processors have that, and loops in Python cannot say it.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from spectrumkv.kernels.fixed_rate.layout import GROUP_ROWS
from spectrumkv.kernels.fixed_rate.quantizer import (
    FRACTION_BITS,
    LARGEST_MAGNITUDE,
    PIECE_BITS,
    PIECES,
    POSITION_BITS,
)
from spectrumkv.kernels.jit.compiled import intrinsic
from spectrumkv.kernels.jit.llvm import I32, I64, LANES, MAGNITUDE, VECTOR, load, pointer_to, vector_at

_VECTORS = GROUP_ROWS // LANES
_INTEGERS = ir.VectorType(I32, LANES)
_BITS, _WORD_PART = ir.VectorType(ir.IntType(1), LANES), ir.IntType(LANES)


def _constant(value: int) -> Any:
    return ir.Constant(_INTEGERS, [value] * LANES)


def _lanes(builder: Any, pointer: Any) -> list[Any]:
    """Return the integers of a group as vectors."""
    return [load(builder, vector_at(builder, pointer, I64(LANES * one), I32)) for one in range(_VECTORS)]


def _word(builder: Any, vectors: list[Any]) -> Any:
    """Return the sign bits of the lanes of vectors as a word."""
    word = I32(0)
    for index, vector in enumerate(vectors):
        part = builder.bitcast(builder.icmp_signed("<", vector, _constant(0)), _WORD_PART)
        word = builder.or_(word, builder.shl(builder.zext(part, I32), I32(LANES * index)))
    return word


def _lookup(builder: Any, table: Any, index: Any) -> Any:
    """Return the elements of a table of `PIECES` integers that a vector of indices names."""
    if LANES * 2 == PIECES:
        halves = [load(builder, vector_at(builder, table, I64(LANES * half), I32)) for half in range(2)]
        kind = ir.FunctionType(_INTEGERS, [_INTEGERS] * 3)
        permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpermi2var.d.512")
        return builder.call(permute, [halves[0], index, halves[1]])
    found = ir.Constant(_INTEGERS, ir.Undefined)
    for lane in range(LANES):
        entry = builder.load(builder.gep(table, [builder.extract_element(index, I32(lane))]))
        found = builder.insert_element(found, entry, I32(lane))
    return found


@intrinsic
def find_cells(_: Any, normalized: Any, offset: Any, slope: Any, width: Any, cell: Any) -> Any:
    """Find the cell of each magnitude of a group, as `reference.cells` does.

    `normalized` is float32 `[GROUP_ROWS]`; `offset` and `slope` are those of the quantizer of `width` bits, int32
    `[PIECES]`; `cell` is int32 `[GROUP_ROWS]`, written.

    Returns:
        The intrinsic's type, and what emits its instructions.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, offsets, slopes, _, target = (
            pointer_to(context, builder, kind, argument, I64(0)) if kind != types.int64 else argument
            for kind, argument in zip(signature.args, arguments, strict=True)
        )
        shift = _splat(builder, builder.sub(I32(POSITION_BITS + 1), builder.trunc(arguments[3], I32)))
        largest = ir.Constant(VECTOR, [float(LARGEST_MAGNITUDE)] * LANES)
        units = ir.Constant(VECTOR, [float(1 << FRACTION_BITS)] * LANES)
        for vector in range(_VECTORS):
            first = I64(LANES * vector)
            bits = builder.bitcast(load(builder, vector_at(builder, source, first)), _INTEGERS)
            magnitude = builder.bitcast(builder.and_(bits, _constant(MAGNITUDE)), VECTOR)
            bounded = builder.select(builder.fcmp_ordered("<", magnitude, largest), magnitude, largest)
            fixed = builder.fptosi(builder.fmul(bounded, units), _INTEGERS)
            piece = builder.lshr(fixed, _constant(PIECE_BITS))
            within = builder.and_(fixed, _constant((1 << PIECE_BITS) - 1))
            rise = builder.mul(_lookup(builder, slopes, piece), within)
            position = builder.add(_lookup(builder, offsets, piece), rise)
            found = builder.lshr(position, shift)
            builder.store(found, vector_at(builder, target, first, I32)).align = 4
        return context.get_dummy_value()

    return types.void(normalized, offset, slope, types.int64, cell), emit


@intrinsic
def write_planes(_: Any, signs: Any, cell: Any, width: Any, words: Any, start: Any) -> Any:
    """Write the words of a group: a plane of signs, then the cells' bits from the highest to the lowest.

    `signs` and `cell` are int32 `[GROUP_ROWS]`: numbers whose highest bits are the signs, and cells. `words` is
    uint32, of which `width` elements from `start` on are written.

    Returns:
        The intrinsic's type, and what emits its instructions.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        target = pointer_to(context, builder, kinds[3], arguments[3], arguments[4])
        sign = _lanes(builder, pointer_to(context, builder, kinds[0], arguments[0], I64(0)))
        builder.store(_word(builder, sign), target)
        # The highest bit of each cell moves to where the sign is; every plane moves the next one there.
        cells = _lanes(builder, pointer_to(context, builder, kinds[1], arguments[1], I64(0)))
        up = builder.sub(I32(33), builder.trunc(arguments[2], I32))
        moved = [cgutils.alloca_once(builder, _INTEGERS) for _ in cells]
        # At a width of 1 there is no such bit, and nothing is read of what a shift by 32 leaves.
        shift = _splat(builder, builder.and_(up, I32(31)))
        for one, variable in zip(cells, moved, strict=True):
            builder.store(builder.shl(one, shift), variable)
        with cgutils.for_range(builder, builder.sub(arguments[2], I64(1))) as loop:
            now = [builder.load(variable) for variable in moved]
            builder.store(_word(builder, now), builder.gep(target, [builder.add(loop.index, I64(1))]))
            for one, variable in zip(now, moved, strict=True):
                builder.store(builder.shl(one, _constant(1)), variable)
        return context.get_dummy_value()

    return types.void(signs, cell, types.int64, words, types.int64), emit


@intrinsic
def read_planes(_: Any, words: Any, start: Any, width: Any, entry: Any) -> Any:
    """Read the words of a group after its signs: the inverse of `write_planes`.

    `entry` is int32 `[GROUP_ROWS]`, written: 2^(width − 1) plus the cell of each row.

    Returns:
        The intrinsic's type, and what emits its instructions.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        source = pointer_to(context, builder, kinds[0], arguments[0], arguments[1])
        target = pointer_to(context, builder, kinds[3], arguments[3], I64(0))
        entries = [cgutils.alloca_once(builder, _INTEGERS) for _ in range(_VECTORS)]
        for variable in entries:
            builder.store(_constant(1), variable)
        with cgutils.for_range(builder, builder.sub(arguments[2], I64(1))) as loop:
            word = builder.load(builder.gep(source, [builder.add(loop.index, I64(1))]))
            for index, variable in enumerate(entries):
                part = builder.trunc(builder.lshr(word, I32(LANES * index)), _WORD_PART)
                bits = builder.zext(builder.bitcast(part, _BITS), _INTEGERS)
                doubled = builder.shl(builder.load(variable), _constant(1))
                builder.store(builder.or_(doubled, bits), variable)
        for index, variable in enumerate(entries):
            builder.store(builder.load(variable), vector_at(builder, target, I64(LANES * index), I32)).align = 4
        return context.get_dummy_value()

    return types.void(words, types.int64, types.int64, entry), emit


def _splat(builder: Any, value: Any) -> Any:
    """Return a vector with one integer in all lanes."""
    undefined = ir.Constant(_INTEGERS, ir.Undefined)
    first = builder.insert_element(undefined, value, I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INTEGERS, None))
