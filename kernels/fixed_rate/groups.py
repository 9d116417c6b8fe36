"""Windows of cells and bit planes of a group of rows, in the vectors of the processor at hand.

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
from spectrumkv.kernels.jit.llvm import I32, I64, LANES, MAGNITUDE, VECTOR, load, pointer_to, splat, vector_at

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


def _bits(builder: Any, word: Any) -> list[Any]:
    """Return the bits of a word as vectors of integers, the inverse of `_word`."""
    vectors = []
    for index in range(_VECTORS):
        part = builder.trunc(builder.lshr(word, I32(LANES * index)), _WORD_PART)
        vectors.append(builder.zext(builder.bitcast(part, _BITS), _INTEGERS))
    return vectors


def _choices(builder: Any, odd: Any) -> Any:
    """Return bit a of the trellis before each row as a word, whose bit i is that of row i; see `reference.choices`.

    Before each row a is what it was two rows before, xor whether the integer between those is odd: the xor of every
    second bit of those below.
    """
    word = builder.shl(odd, I32(1))
    distance = 2
    while distance < GROUP_ROWS:
        word = builder.xor(word, builder.shl(word, I32(distance)))
        distance *= 2
    return word


@intrinsic
def find_windows(_: Any, normalized: Any, offset: Any, slope: Any, width: Any, window: Any) -> Any:
    """Find the lowest of the four cells nearest to each coefficient of a group, as `reference.windows` does.

    `normalized` is float32 `[GROUP_ROWS]`; `offset` and `slope` are those of the quantizer of `width` bits, int32
    `[PIECES]`; `window` is int32 `[GROUP_ROWS]`, written. At a width of 0 it is any numbers.

    Returns:
        The intrinsic's type, and what emits its instructions.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, offsets, slopes, _, target = (
            pointer_to(context, builder, kind, argument, I64(0)) if kind != types.int64 else argument
            for kind, argument in zip(signature.args, arguments, strict=True)
        )
        width = builder.trunc(arguments[3], I32)
        shift = builder.sub(I32(POSITION_BITS), width)
        half = splat(builder, builder.shl(I32(1), builder.sub(shift, I32(1))))
        cells = builder.shl(I32(1), width)
        least, most = (splat(builder, one) for one in (builder.neg(cells), builder.sub(cells, I32(4))))
        largest = ir.Constant(VECTOR, [float(LARGEST_MAGNITUDE)] * LANES)
        units = ir.Constant(VECTOR, [float(1 << FRACTION_BITS)] * LANES)
        for vector in range(_VECTORS):
            first = I64(LANES * vector)
            value = load(builder, vector_at(builder, source, first))
            bits = builder.bitcast(value, _INTEGERS)
            magnitude = builder.bitcast(builder.and_(bits, _constant(MAGNITUDE)), VECTOR)
            bounded = builder.select(builder.fcmp_ordered("<", magnitude, largest), magnitude, largest)
            fixed = builder.fptosi(builder.fmul(bounded, units), _INTEGERS)
            piece = builder.lshr(fixed, _constant(PIECE_BITS))
            within = builder.and_(fixed, _constant((1 << PIECE_BITS) - 1))
            rise = builder.mul(_lookup(builder, slopes, piece), within)
            position = builder.add(_lookup(builder, offsets, piece), rise)
            negative = builder.fcmp_ordered("<", value, ir.Constant(VECTOR, [0.0] * LANES))
            position = builder.select(negative, builder.not_(position), position)
            above = builder.ashr(builder.add(position, half), splat(builder, shift))
            lowest = builder.sub(above, _constant(2))
            lowest = builder.select(builder.icmp_signed("<", lowest, most), lowest, most)
            lowest = builder.select(builder.icmp_signed(">", lowest, least), lowest, least)
            builder.store(lowest, vector_at(builder, target, first, I32)).align = 4
        return context.get_dummy_value()

    return types.void(normalized, offset, slope, types.int64, window), emit


@intrinsic
def write_planes(_: Any, window: Any, odd: Any, used: Any, width: Any, words: Any, start: Any) -> Any:
    """Write the words of a group: the bits of its integers, from the highest to the lowest.

    `window` is int32 `[GROUP_ROWS]`, of `find_windows`; `odd` has a bit for each row, whether its integer is odd, and
    `used` whether there is such a row. `words` is uint32, of which `width` elements from `start` on are written.

    Returns:
        The intrinsic's type, and what emits its instructions.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds, (_, odd, used, width, _, _) = signature.args, arguments
        target = pointer_to(context, builder, kinds[4], arguments[4], arguments[5])
        windows = _lanes(builder, pointer_to(context, builder, kinds[0], arguments[0], I64(0)))
        choices = _bits(builder, _choices(builder, odd))
        # The highest bit of each integer moves to where the sign is; every plane moves the next one there.
        moved = [cgutils.alloca_once(builder, _INTEGERS) for _ in windows]
        shift = splat(builder, builder.sub(I32(32), builder.trunc(width, I32)))
        for lowest, parity, choice, variable in zip(windows, _bits(builder, odd), choices, moved, strict=True):
            remainder = builder.add(builder.shl(parity, _constant(1)), choice)
            fours = builder.and_(builder.sub(builder.add(lowest, _constant(3)), remainder), _constant(-4))
            integer = builder.ashr(builder.add(fours, remainder), _constant(1))
            builder.store(builder.shl(integer, shift), variable)
        with cgutils.for_range(builder, width) as loop:
            now = [builder.load(variable) for variable in moved]
            builder.store(builder.and_(_word(builder, now), used), builder.gep(target, [loop.index]))
            for one, variable in zip(now, moved, strict=True):
                builder.store(builder.shl(one, _constant(1)), variable)
        return context.get_dummy_value()

    return types.void(window, types.uint32, types.uint32, types.int64, words, types.int64), emit


@intrinsic
def read_planes(_: Any, words: Any, start: Any, width: Any, entry: Any) -> Any:
    """Read the words of a group.

    `entry` is int32 `[GROUP_ROWS]`, written: where the level of each row's cell is; see `quantizer.Quantizers`.

    Returns:
        The intrinsic's type, and what emits its instructions.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds, width = signature.args, arguments[2]
        source = pointer_to(context, builder, kinds[0], arguments[0], arguments[1])
        target = pointer_to(context, builder, kinds[3], arguments[3], I64(0))
        entries = [cgutils.alloca_once(builder, _INTEGERS) for _ in range(_VECTORS)]

        def append(word: Any) -> None:
            for bits, variable in zip(_bits(builder, word), entries, strict=True):
                doubled = builder.shl(builder.load(variable), _constant(1))
                builder.store(builder.or_(doubled, bits), variable)

        for variable in entries:
            builder.store(_constant(1), variable)
        with cgutils.for_range(builder, width) as loop:
            append(builder.load(builder.gep(source, [loop.index])))
        # The lowest bits are in the last word.
        append(_choices(builder, builder.load(builder.gep(source, [builder.sub(width, I64(1))]))))
        for index, variable in enumerate(entries):
            builder.store(builder.load(variable), vector_at(builder, target, I64(LANES * index), I32)).align = 4
        return context.get_dummy_value()

    return types.void(words, types.int64, types.int64, entry), emit
