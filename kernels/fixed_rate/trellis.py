"""Trellis-coded quantization, compiled for CPUs.

Marcellin and Fischer 1990, "Trellis coded quantization of memoryless and Gauss-Markov sources", IEEE Transactions on
Communications 38(1). The trellis is Ungerboeck's with four states (1982, "Channel coding with multilevel/phase
signals", IEEE Transactions on Information Theory 28(1)).

The integers of a group's rows, one after another, stand for cells of a quantizer that has twice as many as their bits
can tell apart. Which half of them is at hand follows from a state of two bits, a and b, both 0 at first:

    an integer k stands for cell 2 · k + a; then a, b = b xor (k odd), a

So every second cell is at hand, and an odd integer in place of an even one changes which ones are for the next rows.
The encoder takes the path of least squared error (Viterbi 1967), which is two thirds of what as many bits leave
without a trellis. Of all cells it looks at the four that are nearest to a coefficient, one for either parity of k at
either value of a. A path is kept as the parities of its integers, a bit a row: all else follows from them.

Lanes of vector instructions are the states of a few tokens, whose paths have nothing to do with each other.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from spectrumkv.kernels.fixed_rate.layout import GROUP_ROWS
from spectrumkv.kernels.fixed_rate.quantizer import STATES, UNREACHED
from spectrumkv.kernels.jit.compiled import intrinsic
from spectrumkv.kernels.jit.llvm import F32, FLOAT_BYTES, I32, I64, MAGNITUDE, pointer_to, splat

# Tokens at a time: additions wait for each other along a path, and those of other tokens fill the time.
TOKENS = 4

_LANES = STATES * TOKENS
_FLOATS, _INTEGERS = ir.VectorType(F32, _LANES), ir.VectorType(I32, _LANES)
_FOUR_FLOATS, _FOUR_INTEGERS = ir.VectorType(F32, STATES), ir.VectorType(I32, STATES)


def _spread(of_state: list[int]) -> Any:
    """Return the mask that has each token's lanes take those of its states that a list names."""
    return ir.Constant(_INTEGERS, [STATES * token + one for token in range(TOKENS) for one in of_state])


# Bits a and b of each state after a row. Before it the state was b, then a where the integer is even and not a where
# it is odd; the cell's remainder by 4 is twice the parity, plus b.
_AFTER = [(state >> 1, state & 1) for state in range(STATES)]
_FROM = [_spread([2 * b + (a ^ parity) for a, b in _AFTER]) for parity in range(2)]
_REMAINDER = [_spread([2 * parity + b for a, b in _AFTER]) for parity in range(2)]


@intrinsic
def find_paths(_: Any, normalized: Any, window: Any, cells: Any, limit: Any, level: Any, odd: Any) -> Any:
    """Find the path of least squared error of a group in each of several tokens, as `reference.path` does.

    `normalized` is float32 `[TOKENS, GROUP_ROWS]`, 0 where a group has fewer rows; `window` is int32 of the same
    shape, of `groups.find_windows`. `cells` is uint32 `[TOKENS]`, how many cells each token's quantizer has; `limit`
    is float32 `[TOKENS]`, the magnitude beyond which coefficients are sent as they are, and have no error; `level` is
    that of `quantizer.Quantizers`. `odd` is uint32 `[TOKENS]`, written: bit i is 1 where the integer of row i is odd.

    Returns:
        The intrinsic's type, and what emits its instructions.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, windows, sizes, limits, levels, target = (
            pointer_to(context, builder, kind, argument, I64(0))
            for kind, argument in zip(signature.args, arguments, strict=True)
        )
        tokens = range(TOKENS)
        size = [builder.load(builder.gep(sizes, [I64(token)])) for token in tokens]
        limit = [builder.load(builder.gep(limits, [I64(token)])) for token in tokens]
        most = _joined(builder, [splat(builder, one, STATES) for one in limit])
        start = [0.0, *(float(UNREACHED),) * (STATES - 1)]
        costs, paths = cgutils.alloca_once(builder, _FLOATS), cgutils.alloca_once(builder, _INTEGERS)
        builder.store(ir.Constant(_FLOATS, start * TOKENS), costs)
        builder.store(ir.Constant(_INTEGERS, None), paths)
        with cgutils.for_range(builder, I64(GROUP_ROWS)) as loop:
            at = [builder.add(I64(GROUP_ROWS * token), loop.index) for token in tokens]
            value = _joined(builder, [splat(builder, builder.load(builder.gep(values, [one])), STATES) for one in at])
            near = [
                _four_levels(builder, levels, builder.load(builder.gep(windows, [one])), own)
                for one, own in zip(at, size, strict=True)
            ]
            difference = builder.fsub(value, _joined(builder, near))
            square = builder.fmul(difference, difference)
            bits = builder.and_(builder.bitcast(value, _INTEGERS), ir.Constant(_INTEGERS, [MAGNITUDE] * _LANES))
            magnitude = builder.bitcast(bits, _FLOATS)
            escapes = builder.fcmp_ordered(">", magnitude, most)
            error = builder.select(escapes, ir.Constant(_FLOATS, None), square)
            cost, path = builder.load(costs), builder.load(paths)
            even, odd = (
                builder.fadd(_shuffled(builder, cost, _FROM[parity]), _shuffled(builder, error, _REMAINDER[parity]))
                for parity in range(2)
            )
            is_odd = builder.fcmp_ordered("<", odd, even)
            bit = splat(builder, builder.shl(I32(1), builder.trunc(loop.index, I32)), _LANES)
            odd_path = builder.or_(_shuffled(builder, path, _FROM[1]), bit)
            builder.store(builder.select(is_odd, odd, even), costs)
            builder.store(builder.select(is_odd, odd_path, _shuffled(builder, path, _FROM[0])), paths)
        cost, path = builder.load(costs), builder.load(paths)
        for token in tokens:
            found = _cheapest(builder, cost, path, STATES * token)
            builder.store(found, builder.gep(target, [I64(token)]))
        return context.get_dummy_value()

    return types.void(normalized, window, cells, limit, level, odd), emit


def _four_levels(builder: Any, levels: Any, window: Any, cells: Any) -> Any:
    """Return the levels of a window's cells as a vector, by their remainder by 4.

    They lie in one or two quadruples of cells; of the second one come those of a smaller remainder than the first
    cell of the window has.
    """
    first = builder.and_(window, I32(-4))
    quadruples = []
    for quadruple in (first, builder.add(first, I32(4))):
        entry = builder.or_(builder.and_(quadruple, builder.sub(cells, I32(1))), cells)
        place = builder.gep(levels, [builder.zext(entry, I64)])
        loaded = builder.load(builder.bitcast(place, _FOUR_FLOATS.as_pointer()))
        loaded.align = FLOAT_BYTES
        quadruples.append(loaded)
    remainder = splat(builder, builder.and_(window, I32(3)), STATES)
    is_second = builder.icmp_signed("<", ir.Constant(_FOUR_INTEGERS, [0, 1, 2, 3]), remainder)
    return builder.select(is_second, quadruples[1], quadruples[0])


def _cheapest(builder: Any, cost: Any, path: Any, first: int) -> Any:
    """Return the path of the state of least cost, the first of equal ones, of the token whose lanes begin there."""
    least, found = (builder.extract_element(one, I32(first)) for one in (cost, path))
    for lane in range(first + 1, first + STATES):
        other = builder.extract_element(cost, I32(lane))
        is_less = builder.fcmp_ordered("<", other, least)
        least = builder.select(is_less, other, least)
        found = builder.select(is_less, builder.extract_element(path, I32(lane)), found)
    return found


def _shuffled(builder: Any, vector: Any, mask: Any) -> Any:
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def _joined(builder: Any, vectors: list[Any]) -> Any:
    """Return vectors one after another as one; there are a power of two of them."""
    while len(vectors) > 1:
        lanes = 2 * vectors[0].type.count
        both = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
        vectors = [builder.shuffle_vector(*pair, both) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]
