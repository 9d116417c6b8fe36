"""Trellis-coded quantization, compiled for CPUs.

Marcellin and Fischer 1990, "Trellis coded quantization of memoryless and Gauss-Markov sources", IEEE Transactions on
Communications 38(1); with an entropy coder after it, Fischer and Wang 1992, "Entropy-constrained trellis-coded
quantization", IEEE Transactions on Information Theory 38(2). The trellis is Ungerboeck's with four states (1982).

The integers of a token's coefficients, one after another, stand for values a quarter of a step above or below them.
Which of the two it is follows from a state of two bits, a and b, both 0 at first:

    an integer k stands for k + a/2 - 1/4 steps; then a, b = b xor (k odd), a

Values so lie half a step apart, and only every second one is at hand: an odd integer in place of an even one changes
which ones are at hand for the next coefficients. The encoder takes the path of least squared error (Viterbi 1967),
which is 0.81 times that of plain rounding. Integers take about as many bits as those of plain rounding where their
standard deviation is a step or more. Values are not smaller than coefficients in the mean, as a dead zone's are.

Tokens have nothing to do with each other: the loops go over them, and each is a lane of vector instructions.
"""

from typing import Any

import numpy as np

from spectrumkv.kernels.jit.compiled import compiled
from spectrumkv.kernels.jit.llvm import greater_magnitude, integer, nearest

STATES = 4
# Larger than the cost of any path, of which there is one only at first.
UNREACHED = np.float32(1e30)
# In units of two steps, which integers of one parity are apart.
HALF, QUARTER, EIGHTH = np.float32(0.5), np.float32(0.25), np.float32(0.125)


@compiled
def start(costs: Any, tokens: int) -> None:
    """Begin the paths of some tokens.

    Args:
        costs: float32 `[STATES, tokens or more]`, written.
        tokens: how many.
    """
    for token in range(tokens):
        costs[0, token] = 0
        costs[1, token] = costs[2, token] = costs[3, token] = UNREACHED


@compiled
def advance(read: Any, scale: Any, costs: Any, choices: Any, largest: Any) -> Any:
    """Find the least cost of each state after one more coefficient.

    Args:
        read: float32 `[tokens]`, one coefficient of each token.
        scale: float32 `[tokens or more]`, 1 ÷ the step.
        costs: float32 `[STATES, tokens or more]`; updated. Costs are squared errors in units of two steps, less a
            number that all four have in common.
        choices: uint8 `[tokens or more]`, written: bit s says by which of the two ways state s was reached.
        largest: the bits of the largest magnitude so far, int32.

    Returns:
        The bits of the largest magnitude.
    """
    cost_0, cost_1, cost_2, cost_3 = costs[0], costs[1], costs[2], costs[3]
    for token in range(read.size):
        largest = greater_magnitude(largest, read[token])
        twos = read[token] * scale[token] * HALF
        # The error of the nearest even integer. Where it is e, that of the nearest odd one is 1/2 - |e|, whose square
        # is greater by 1/4 - |e|.
        below, above = twos + EIGHTH - nearest(twos + EIGHTH), twos - EIGHTH - nearest(twos - EIGHTH)
        more_below, more_above = QUARTER - abs(below), QUARTER - abs(above)
        apart = above * above - below * below
        from_0, from_1, from_2, from_3 = cost_0[token], cost_1[token], cost_2[token] + apart, cost_3[token] + apart
        odd_0, odd_1, odd_2, odd_3 = (
            from_0 + more_below,
            from_1 + more_below,
            from_2 + more_above,
            from_3 + more_above,
        )
        cost_0[token] = odd_1 if odd_1 < from_0 else from_0
        cost_1[token] = odd_3 if odd_3 < from_2 else from_2
        cost_2[token] = from_1 if from_1 < odd_0 else odd_0
        cost_3[token] = from_3 if from_3 < odd_2 else odd_2
        choices[token] = (
            np.uint8(odd_1 < from_0)
            | np.uint8(odd_3 < from_2) << np.uint8(1)
            | np.uint8(from_1 < odd_0) << np.uint8(2)
            | np.uint8(from_3 < odd_2) << np.uint8(3)
        )
    return largest


@compiled
def best(costs: Any, states: Any) -> None:
    """Find the state in which each token's cheapest path ends.

    Args:
        costs: float32 `[STATES, tokens or more]`.
        states: int32 `[tokens]`, written.
    """
    for token in range(states.size):
        least, state = costs[0, token], np.int32(0)
        for other in range(1, STATES):
            cheaper = costs[other, token] < least
            least = costs[other, token] if cheaper else least
            state = np.int32(other) if cheaper else state
        states[token] = state


@compiled
def go_back(read: Any, scale: Any, choices: Any, states: Any, written: Any) -> None:
    """Follow the cheapest paths back over one coefficient.

    Args:
        read: see `advance`.
        scale: see `advance`.
        choices: see `advance`.
        states: int32 `[tokens or more]`, 2 · a + b of the state after the coefficient; updated to the one before.
        written: int32 `[tokens]`, the integers.
    """
    for token in range(read.size):
        state = states[token]
        choice = (np.int32(choices[token]) >> state) & np.int32(1)
        # The state before was a, b = (b now), choice; a now is b before, where the integer is even.
        a = state & np.int32(1)
        odd = choice ^ (state >> np.int32(1))
        shift = EIGHTH - np.float32(a) * QUARTER - np.float32(odd) * HALF
        written[token] = np.int32(2) * integer(nearest(read[token] * scale[token] * HALF + shift)) + odd
        states[token] = np.int32(2) * a + choice


@compiled
def dequantize(read: Any, scale: Any, states: Any, written: Any) -> None:
    """Turn the integers of one coefficient of each token into values.

    Args:
        read: int32 `[tokens]`, integers.
        scale: float32 `[tokens or more]`, the step.
        states: int32 `[tokens or more]`, 2 · a + b of the state before the coefficient; updated to the one after.
        written: float32 `[tokens]`, the coefficients.
    """
    for token in range(read.size):
        state = states[token]
        a, b = state >> np.int32(1), state & np.int32(1)
        written[token] = (np.float32(read[token]) + (np.float32(a) * HALF - QUARTER)) * scale[token]
        states[token] = np.int32(2) * ((read[token] & np.int32(1)) ^ b) + a
