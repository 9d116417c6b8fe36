"""What symbols are expected to take, on CPUs: the loops of the spectral codec's rate control.

Entropies are looked up in a table: of normally distributed symbols whose standard deviation is 2^x steps, for x
from `LOWEST` upwards, `PER_OCTAVE` of them for each octave, linear between. Below the table they are its first entry,
above it they grow by a bit an octave (the high-rate formula, log2(σ √(2πe))).
"""

from typing import Any

from spectrumkv.kernels.jit.compiled import compiled

LOWEST, PER_OCTAVE = -6, 64


@compiled
def entropy(exponent: float, table: Any, unsent: float) -> float:
    """Bits a symbol; 0 where the exponent is `unsent` or less."""
    if exponent <= unsent:
        return 0.0
    place = (exponent - LOWEST) * PER_OCTAVE
    last = table.size - 1
    if place <= 0:
        return float(table[0])
    if place >= last:
        return float(table[last] + (place - last) / PER_OCTAVE)
    below = int(place)
    return float(table[below] + (place - below) * (table[below + 1] - table[below]))


@compiled
def expected_bits(exponents: Any, shift: float, counts: Any, table: Any, unsent: float) -> float:
    """Bits of so many symbols of each spread.

    Args:
        exponents: float64 `[m]`, binary logarithms of the spreads.
        shift: of the step.
        counts: int64 `[m]`.
        table: float64, see the module.
        unsent: symbols of this exponent or less, in steps, take nothing.
    """
    bits = 0.0
    for index in range(exponents.size):
        if counts[index]:
            bits += counts[index] * entropy(exponents[index] - shift, table, unsent)
    return bits


@compiled
def mean_bits(exponents: Any, shifts: Any, counts: Any, table: Any, unsent: float, bits: Any) -> None:
    """Write to `bits`, float64 `[n]`, the mean of a symbol's bits for each of the steps `shifts`, likewise."""
    symbols = counts.sum()
    for index in range(shifts.size):
        bits[index] = expected_bits(exponents, shifts[index], counts, table, unsent) / symbols


@compiled
def finest_within(
    available: float, low: float, high: float, close: float, exponents: Any, counts: Any, table: Any, unsent: float
) -> float:
    """The least step's logarithm from `low` to `high`, up to `close`, at which symbols take `available` bits at most.

    The other arguments are those of `expected_bits`. Where not even `high` is enough, that is returned.
    """
    while high - low > close:
        middle = (low + high) / 2
        if expected_bits(exponents, middle, counts, table, unsent) > available:
            low = middle
        else:
            high = middle
    return high
