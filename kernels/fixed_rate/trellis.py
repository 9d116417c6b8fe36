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

Groups have nothing to do with each other: the loops go over the tokens, and each is a lane of vector instructions.
"""

from typing import Any

import numpy as np

from spectrumkv.kernels.fixed_rate.layout import GROUP_ROWS
from spectrumkv.kernels.jit.compiled import compiled

STATES = 4
# Larger than the cost of any path, of which there is one only at first.
UNREACHED = np.float32(1e30)
# Tokens at a time.
TOKENS = 32


@compiled
def find_paths(
    normalized: Any, window: Any, lanes: Any, level: Any, costs: Any, paths: Any, odd: Any
) -> None:
    """Find the path of least squared error of a group in each of several tokens, as `reference.path` does.

    Args:
        normalized: float32 `[TOKENS, GROUP_ROWS]`, coefficients in units of their standard deviation and gain,
            0 where a group has fewer rows.
        window: uint32 `[TOKENS, GROUP_ROWS]`, the lowest of the four cells nearest to each, in two's complement.
        lanes: of each token: how many cells the quantizer has, uint32 `[TOKENS]`; the magnitude beyond which
            coefficients are sent as they are, float32 `[TOKENS]`.
        level: float32, of all quantizers; see `quantizer.Quantizers`.
        costs: float32 `[STATES, TOKENS]`, for the loop's own use.
        paths: uint32 `[STATES, TOKENS]`, likewise.
        odd: uint32 `[TOKENS]`, written: bit i says whether the integer of row i is odd.
    """
    costs[0], costs[1:], paths[:] = 0, UNREACHED, 0
    for row in range(GROUP_ROWS):
        advance(normalized[:, row], window[:, row], lanes, level, np.uint32(1) << np.uint32(row), costs, paths)
    for token in range(TOKENS):
        least, path = costs[0, token], paths[0, token]
        for state in range(1, STATES):
            path = paths[state, token] if costs[state, token] < least else path
            least = costs[state, token] if costs[state, token] < least else least
        odd[token] = path


@compiled
def advance(value: Any, window: Any, lanes: Any, level: Any, bit: Any, costs: Any, paths: Any) -> None:
    """Extend the cheapest path to each state by one row.

    Args:
        value: float32 `[TOKENS]`, the row's coefficient in each token.
        window: uint32 `[TOKENS]`.
        lanes: see `find_paths`.
        level: see `find_paths`.
        bit: of the row in a path.
        costs: float32 `[STATES, TOKENS]`; updated.
        paths: uint32 `[STATES, TOKENS]`; updated.
    """
    cells, limit = lanes
    cost_0, cost_1, cost_2, cost_3 = costs[0], costs[1], costs[2], costs[3]
    path_0, path_1, path_2, path_3 = paths[0], paths[1], paths[2], paths[3]
    for token in range(TOKENS):
        error_0 = error(value[token], window[token], np.uint32(0), cells[token], limit[token], level)
        error_1 = error(value[token], window[token], np.uint32(1), cells[token], limit[token], level)
        error_2 = error(value[token], window[token], np.uint32(2), cells[token], limit[token], level)
        error_3 = error(value[token], window[token], np.uint32(3), cells[token], limit[token], level)
        from_0, from_1, from_2, from_3 = cost_0[token], cost_1[token], cost_2[token], cost_3[token]
        before_0, before_1, before_2, before_3 = path_0[token], path_1[token], path_2[token], path_3[token]
        even_0, odd_0 = from_0 + error_0, from_1 + error_2
        even_1, odd_1 = from_2 + error_1, from_3 + error_3
        even_2, odd_2 = from_1 + error_0, from_0 + error_2
        even_3, odd_3 = from_3 + error_1, from_2 + error_3
        cost_0[token] = odd_0 if odd_0 < even_0 else even_0
        cost_1[token] = odd_1 if odd_1 < even_1 else even_1
        cost_2[token] = odd_2 if odd_2 < even_2 else even_2
        cost_3[token] = odd_3 if odd_3 < even_3 else even_3
        path_0[token] = before_1 | bit if odd_0 < even_0 else before_0
        path_1[token] = before_3 | bit if odd_1 < even_1 else before_2
        path_2[token] = before_0 | bit if odd_2 < even_2 else before_1
        path_3[token] = before_2 | bit if odd_3 < even_3 else before_3


@compiled
def error(value: float, window: Any, remainder: Any, cells: Any, limit: float, level: Any) -> Any:
    """Return the squared error of the cell in a window that has a remainder by 4: a float32.

    Args:
        value: a coefficient.
        window: the lowest of four cells.
        remainder: uint32, from 0 to 3.
        cells: how many the quantizer has.
        limit: magnitude beyond which a coefficient is sent as it is, and has no error.
        level: of all quantizers.
    """
    cell = np.uint32((window + np.uint32(3) - remainder) & np.uint32(0xFFFFFFFC)) | remainder
    difference = value - level[cells | (cell & (cells - np.uint32(1)))]
    return np.float32(0) if abs(value) > limit else difference * difference
