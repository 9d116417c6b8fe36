"""Trellis-coded quantization in Triton; `kernels.fixed_rate.trellis` says what it is, `reference` what comes out."""

import triton.language as tl

from spectrumkv.kernels.fixed_rate import quantizer
from spectrumkv.kernels.fixed_rate.triton.integers import GROUP_ROWS
from spectrumkv.kernels.triton_shared import jit

FRACTION = tl.constexpr(float(1 << quantizer.FRACTION_BITS))
LARGEST_MAGNITUDE = tl.constexpr(float(quantizer.LARGEST_MAGNITUDE))
MAGNITUDE_MASK = tl.constexpr((quantizer.PIECES << quantizer.PIECE_BITS) - 1)
PIECE_BITS, PIECES = tl.constexpr(quantizer.PIECE_BITS), tl.constexpr(quantizer.PIECES)
WITHIN_MASK = tl.constexpr((1 << quantizer.PIECE_BITS) - 1)
POSITION_BITS = tl.constexpr(quantizer.POSITION_BITS)
# Half a cell of a quantizer of 0 bits.
HALF_POSITION = tl.constexpr(1 << (quantizer.POSITION_BITS - 1))
UNREACHED = tl.constexpr(float(quantizer.UNREACHED))


@jit
def windows(normalized: tl.tensor, width: tl.tensor, offset_ptr: tl.tensor, slope_ptr: tl.tensor) -> tl.tensor:
    """Return the lowest of the four cells nearest to each coefficient; see `reference.windows`."""
    # Of what is not finite, and is refused later, some bits are taken that lie in the table.
    fixed = (tl.minimum(tl.abs(normalized), LARGEST_MAGNITUDE) * FRACTION).to(tl.int32) & MAGNITUDE_MASK
    entry = width * PIECES + (fixed >> PIECE_BITS)
    position = tl.load(offset_ptr + entry)
    position += tl.load(slope_ptr + entry) * (fixed & WITHIN_MASK)
    position = tl.where(normalized < 0.0, -1 - position, position)
    half = tl.full(width.shape, HALF_POSITION, tl.int32) >> width
    lowest = ((position + half) >> (-width + POSITION_BITS)) - 2
    cells = tl.full(width.shape, 1, tl.int32) << width
    return tl.maximum(tl.minimum(lowest, cells - 4), -cells)


@jit
def cell_of_remainder(window: tl.tensor, remainder: tl.tensor) -> tl.tensor:
    """Return the cell of a window that has a remainder by 4; see `reference.cell_of_remainder`."""
    return ((window + 3 - remainder) & -4) + remainder


@jit
def _errors(
    normalized: tl.tensor,
    window: tl.tensor,
    remainder: tl.constexpr,
    cells: tl.tensor,
    escaping: tl.tensor,
    level_ptr: tl.tensor,
) -> tl.tensor:
    """Return the squared error of the cell in each window that has a remainder by 4, of `cells`; of an escape 0."""
    cell = cell_of_remainder(window, remainder) & (cells - 1)
    difference = normalized - tl.load(level_ptr + cells + cell)
    return tl.where(escaping, 0.0, difference * difference)


@jit
def find_paths(
    normalized: tl.tensor, window: tl.tensor, width: tl.tensor, limit: tl.tensor, level_ptr: tl.tensor
) -> tl.tensor:
    """Find the path of least squared error in each group; see `reference.path`.

    Groups are the lines of tiles, and their rows come one after another. `width` and `limit` are columns, of one
    element in each line.

    Returns:
        Such a column, int32: a bit for each row of a group, whether its integer is odd.
    """
    escaping, cells = tl.abs(normalized) > limit, tl.full(width.shape, 2, tl.int32) << width
    errors_0 = _errors(normalized, window, 0, cells, escaping, level_ptr)
    errors_1 = _errors(normalized, window, 1, cells, escaping, level_ptr)
    errors_2 = _errors(normalized, window, 2, cells, escaping, level_ptr)
    errors_3 = _errors(normalized, window, 3, cells, escaping, level_ptr)
    cost_0, unreached = tl.zeros(limit.shape, tl.float32), tl.full(limit.shape, UNREACHED, tl.float32)
    cost_1, cost_2, cost_3 = unreached, unreached, unreached
    path_0, bit = tl.zeros(width.shape, tl.int32), tl.full(width.shape, 1, tl.int32)
    path_1, path_2, path_3 = path_0, path_0, path_0
    for row in range(GROUP_ROWS):
        own = tl.full(width.shape, 0, tl.int32) + row
        error_0, error_1 = tl.gather(errors_0, own, axis=1), tl.gather(errors_1, own, axis=1)
        error_2, error_3 = tl.gather(errors_2, own, axis=1), tl.gather(errors_3, own, axis=1)
        even_0, odd_0 = cost_0 + error_0, cost_1 + error_2
        even_1, odd_1 = cost_2 + error_1, cost_3 + error_3
        even_2, odd_2 = cost_1 + error_0, cost_0 + error_2
        even_3, odd_3 = cost_3 + error_1, cost_2 + error_3
        cost_0, cost_1 = tl.where(odd_0 < even_0, odd_0, even_0), tl.where(odd_1 < even_1, odd_1, even_1)
        cost_2, cost_3 = tl.where(odd_2 < even_2, odd_2, even_2), tl.where(odd_3 < even_3, odd_3, even_3)
        from_0, from_1, from_2, from_3 = path_0, path_1, path_2, path_3
        path_0 = tl.where(odd_0 < even_0, from_1 | bit, from_0)
        path_1 = tl.where(odd_1 < even_1, from_3 | bit, from_2)
        path_2 = tl.where(odd_2 < even_2, from_0 | bit, from_1)
        path_3 = tl.where(odd_3 < even_3, from_2 | bit, from_3)
        bit <<= 1
    path = tl.where(cost_1 < cost_0, path_1, path_0)
    least = tl.where(cost_1 < cost_0, cost_1, cost_0)
    path = tl.where(cost_2 < least, path_2, path)
    least = tl.where(cost_2 < least, cost_2, least)
    return tl.where(cost_3 < least, path_3, path)
