"""How fine the tokens of a segment are coded, and which symbols therefore share a stream.

A coefficient of standard deviation σ (in the basis's units) in a token of step s has symbols of standard deviation
σ / s. Both are sorted into classes of half octaves, and symbols of one difference between the two classes share a
stream, since they are alike.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import erf, sqrt

import numpy as np

from spectrumkv.common.kv.codecs.spectral.symbols import PACKINGS, PackedStreams, edges
from spectrumkv.kernels.spectral import rate as kernels
from spectrumkv.kernels.spectral.rate import LOWEST, PER_OCTAVE
from spectrumkv.kernels.step_classes import CLASSES_PER_OCTAVE, HIGHEST_CLASS, LOWEST_CLASS

STEP_CLASSES = np.arange(LOWEST_CLASS, HIGHEST_CLASS + 1)

# Exponent of the standard deviation, in steps, from which on symbols are quantized in the trellis. None of its values
# is 0, which would cost narrower symbols more bits than it saves.
NARROWEST_IN_TRELLIS = -0.5
# Where the entropy table ends.
HIGHEST = 6
# Octaves up to which a step is sought.
CLOSE_ENOUGH = 1e-4


@dataclass(frozen=True, eq=False)
class TokenClasses:
    """How fine the tokens of a segment are relative to each other.

    Attributes:
        classes: int64 `[n]`, from LOWEST_CLASS to HIGHEST_CLASS. Sinks have a class as well, which is not used.
        sinks: how many of the first tokens are sent in the 16-bit dtype.
    """

    classes: np.ndarray
    sinks: int

    @cached_property
    def coded(self) -> np.ndarray:
        """Return the classes of the tokens that have a step, counted from 0: uint8 `[n − sinks]`."""
        return (self.classes[self.sinks :] - LOWEST_CLASS).astype(np.uint8)

    @cached_property
    def order(self) -> np.ndarray:
        """Sort the tokens that have a step, counted from the first of them, by rising class: int64 `[n − sinks]`."""
        return np.argsort(self.coded, kind="stable")

    @cached_property
    def of_each(self) -> np.ndarray:
        """Count the tokens of each class: int64 `[classes]`."""
        return np.bincount(self.coded, minlength=len(STEP_CLASSES))

    @cached_property
    def start(self) -> np.ndarray:
        """Return where each class starts in `order`: int64 `[classes + 1]`."""
        return edges(self.of_each)


def std_classes(std: np.ndarray) -> np.ndarray:
    """Sort coefficients into classes of half octaves.

    Args:
        std: float32 of any shape, standard deviations.

    Returns:
        int64, of the same shape: the rounded binary logarithms in half octaves.
    """
    classes: np.ndarray = np.rint(CLASSES_PER_OCTAVE * np.log2(std)).astype(np.int64)
    return classes


@dataclass(frozen=True, eq=False)
class StreamLayout:
    """Which symbols share a stream in the segments of a layer, from the narrowest stream to the widest.

    Attributes:
        exponent: float64 `[streams]`, binary logarithm of the standard deviation of a stream's symbols where the step
            of class 0 is 1. Exact, so that both sides pack a stream alike whatever machines they are.
        stream_of: int64 `[classes, runs]`, the stream of a token's step class (from `LOWEST_CLASS`) and a run.
        rows: int64 `[streams, classes]`, how many coefficients of a token of each class are in a stream.
    """

    exponent: np.ndarray
    stream_of: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, run_classes: np.ndarray, run_rows: np.ndarray) -> "StreamLayout":
        """Lay out the streams of a layer.

        Args:
            run_classes: int64 `[runs]`, classes of standard deviations, rising.
            run_rows: int64 `[runs]`, how many coefficients each has.

        Returns:
            The layout.
        """
        lowest, highest = int(run_classes[0]) - HIGHEST_CLASS, int(run_classes[-1]) - LOWEST_CLASS
        stream_of = run_classes - lowest - STEP_CLASSES[:, None]
        rows = np.zeros((highest - lowest + 1, len(STEP_CLASSES)), np.int64)
        rows[stream_of, np.arange(len(STEP_CLASSES))[:, None]] = run_rows
        return cls(np.arange(lowest, highest + 1) / CLASSES_PER_OCTAVE, stream_of, rows)

    def packed(self, tokens: np.ndarray, base: float) -> PackedStreams:
        """Choose how the streams of a segment are packed.

        Args:
            tokens: int64 `[classes]`, how many have each step class.
            base: binary logarithm of the step of class 0, a float32.

        Returns:
            A packing for each stream.
        """
        return PackedStreams.of(self.rows @ tokens, self.exponent - base)


@lru_cache(maxsize=1)
def entropy_table() -> np.ndarray:
    """Compute the entropy of a Gaussian rounded to integers, by its standard deviation.

    In the trellis one half of the integers stand for values a quarter of a step below them, the others above. At
    steps Δ much finer than σ it is the high-resolution h(X) − log₂ Δ (Gray & Neuhoff 1998, "Quantization", IEEE
    Transactions on Information Theory 44(6)). That fails at coarse steps, so the sum itself is tabulated.

    Returns:
        float64 `[(HIGHEST − LOWEST) · PER_OCTAVE + 1]`, bits, as `kernels.spectral.rate` reads them: `PER_OCTAVE` an
        octave, from 2^`LOWEST` to 2^`HIGHEST` steps.
    """
    entropies = []
    for exponent in np.arange(LOWEST * PER_OCTAVE, HIGHEST * PER_OCTAVE + 1) / PER_OCTAVE:
        std, shift = 2.0**exponent, 0.25 if exponent >= NARROWEST_IN_TRELLIS else 0.0
        farthest = int(9 * std) + 2
        borders = np.arange(-farthest, farthest) + 0.5
        # Those of values below are those of values above in the opposite order.
        above = _normal_shares((borders + shift) / std)
        probabilities = (above[::-1] + above) / 2
        probabilities = probabilities[probabilities > 1e-15]
        entropies.append(float(-(probabilities * np.log2(probabilities)).sum()))
    return np.array(entropies)


def _normal_shares(borders: np.ndarray) -> np.ndarray:
    """Return the probability of a standard normal variable between each two of some rising borders."""
    return np.diff([erf(border / sqrt(2)) / 2 for border in borders])


def expected_bits(exponents: np.ndarray, shift: float, counts: np.ndarray) -> float:
    """Add up what symbols of several standard deviations are expected to take.

    Args:
        exponents: float64 `[m]`, binary logarithms of the standard deviations.
        shift: binary logarithm of the step.
        counts: int64 `[m]`, symbols of each.

    Returns:
        Bits.
    """
    return float(kernels.expected_bits(exponents, shift, counts, entropy_table(), PACKINGS[0].widest))


def mean_bits(exponents: np.ndarray, shifts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Average what one of the symbols is expected to take, for each of several steps.

    Args:
        exponents: float64 `[m]`, binary logarithms of the standard deviations.
        shifts: float64 `[n]`, binary logarithms of the steps.
        counts: int64 `[m]`, symbols of each standard deviation.

    Returns:
        float64 `[n]`, bits.
    """
    bits = np.empty(len(shifts))
    kernels.mean_bits(exponents, shifts, counts, entropy_table(), PACKINGS[0].widest, bits)
    return bits


def finest_step_within(bits: float, low: float, high: float, exponents: np.ndarray, counts: np.ndarray) -> float:
    """Find the finest step with which symbols keep to a number of bits.

    Args:
        bits: that they may take together.
        low: binary logarithm of the finest step.
        high: binary logarithm of the coarsest step.
        exponents: float64 `[m]`, binary logarithms of the standard deviations.
        counts: int64 `[m]`, symbols of each.

    Returns:
        The step's binary logarithm; `high` where no step keeps to `bits`.
    """
    table, unsent = entropy_table(), PACKINGS[0].widest
    return float(kernels.finest_within(bits, low, high, CLOSE_ENOUGH, exponents, counts, table, unsent))
