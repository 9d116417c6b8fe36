"""How many bits symbols are expected to take: the loops of the spectral codec's rate control, compiled for CPUs.

Entropies come from a table. Entry i is the entropy of normally distributed symbols whose standard deviation is 2^x
steps, x = `LOWEST` + i / `PER_OCTAVE`; between two entries it is linear. Below the table it is the first entry, above
it grows by a bit an octave (the high-rate formula log2(σ √(2πe)); Gish and Pierce 1968, "Asymptotically efficient
quantizing").
"""

from typing import Any

from spectrumkv.kernels.jit.compiled import compiled

LOWEST, PER_OCTAVE = -6, 64


@compiled
def entropy(exponent: float, table: Any, unsent: float) -> float:
    """Return the expected bits of a symbol.

    Args:
        exponent: binary logarithm of the symbols' standard deviation in steps.
        table: float64; see the module.
        unsent: symbols of this exponent or less take nothing.
    """
    if exponent <= unsent:
        return 0.0
    position = (exponent - LOWEST) * PER_OCTAVE
    last = table.size - 1
    if position <= 0:
        return float(table[0])
    if position >= last:
        return float(table[last] + (position - last) / PER_OCTAVE)
    below = int(position)
    return float(table[below] + (position - below) * (table[below + 1] - table[below]))


@compiled
def expected_bits(exponents: Any, shift: float, counts: Any, table: Any, unsent: float) -> float:
    """Return the expected bits of symbols with several standard deviations.

    Args:
        exponents: float64 `[m]`, binary logarithms of the standard deviations.
        shift: binary logarithm of the step.
        counts: int64 `[m]`, how many symbols have each.
        table: float64; see the module.
        unsent: symbols of this exponent or less, in steps, take nothing.
    """
    bits = 0.0
    for index in range(exponents.size):
        if counts[index]:
            bits += counts[index] * entropy(exponents[index] - shift, table, unsent)
    return bits


@compiled
def mean_bits(exponents: Any, shifts: Any, counts: Any, table: Any, unsent: float, bits: Any) -> None:
    """Write the mean of a symbol's expected bits for each of several steps.

    Args:
        exponents: float64 `[m]`; see `expected_bits`.
        shifts: float64 `[n]`, binary logarithms of the steps.
        counts: int64 `[m]`, at least one symbol in all.
        table: float64; see the module.
        unsent: see `expected_bits`.
        bits: float64 `[n]`, written.
    """
    symbols = counts.sum()
    for index in range(shifts.size):
        bits[index] = expected_bits(exponents, shifts[index], counts, table, unsent) / symbols


@compiled
def finest_within(
    available: float, low: float, high: float, close: float, exponents: Any, counts: Any, table: Any, unsent: float
) -> float:
    """Return the binary logarithm of the least step at which symbols are expected to take so many bits at most.

    Args:
        available: bits.
        low: where the search begins, a binary logarithm.
        high: where it ends; this is returned where not even that step is coarse enough.
        close: how near the answer comes to the least step.
        exponents: float64 `[m]`; see `expected_bits`.
        counts: int64 `[m]`.
        table: float64; see the module.
        unsent: see `expected_bits`.
    """
    while high - low > close:
        middle = (low + high) / 2
        if expected_bits(exponents, middle, counts, table, unsent) > available:
            low = middle
        else:
            high = middle
    return high
