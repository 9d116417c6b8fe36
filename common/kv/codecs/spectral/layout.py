"""Which symbols share a stream: those of one difference between spread class and step class.

A coefficient of spread σ (in the basis's units) in a token of step s has symbols of standard deviation σ / s. With
both classes in half octaves, symbols of one difference are alike.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import erf, sqrt

import numpy as np

from spectrumkv.common.kv.codecs.spectral.symbols import PACKINGS, PackedStreams
from spectrumkv.kernels.spectral import rate as kernels
from spectrumkv.kernels.spectral.rate import LOWEST, PER_OCTAVE

# Classes per octave of step and of spread.
CLASSES_PER_OCTAVE = 2
# Step classes around the mean token: three octaves finer, one and a half coarser.
LOWEST_CLASS, HIGHEST_CLASS = -6, 3
STEP_CLASSES = np.arange(LOWEST_CLASS, HIGHEST_CLASS + 1)

# Where the entropy table ends.
HIGHEST = 6
# Octaves up to which a step is sought.
CLOSE_ENOUGH = 1e-4


def spread_classes(spread: np.ndarray) -> np.ndarray:
    """Class of each coefficient: int64, its spread's logarithm in half octaves."""
    classes: np.ndarray = np.rint(CLASSES_PER_OCTAVE * np.log2(spread)).astype(np.int64)
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
            run_classes: int64 `[runs]`, spread classes, rising.
            run_rows: int64 `[runs]`, how many coefficients each has.
        """
        lowest, highest = int(run_classes[0]) - HIGHEST_CLASS, int(run_classes[-1]) - LOWEST_CLASS
        stream_of = run_classes - lowest - STEP_CLASSES[:, None]
        rows = np.zeros((highest - lowest + 1, len(STEP_CLASSES)), np.int64)
        rows[stream_of, np.arange(len(STEP_CLASSES))[:, None]] = run_rows
        return cls(np.arange(lowest, highest + 1) / CLASSES_PER_OCTAVE, stream_of, rows)

    def packed(self, tokens: np.ndarray, base: float) -> PackedStreams:
        """How the streams of a segment are packed.

        Args:
            tokens: int64 `[classes]`, how many have each step class.
            base: binary logarithm of the step of class 0, a float32.
        """
        return PackedStreams.of(self.rows @ tokens, self.exponent - base)


@lru_cache(maxsize=1)
def entropy_table() -> np.ndarray:
    """Entropy in bits of a Gaussian rounded to integers, as `kernels.spectral.rate` reads it: up to 2^6 steps."""
    entropies = []
    for exponent in np.arange(LOWEST * PER_OCTAVE, HIGHEST * PER_OCTAVE + 1) / PER_OCTAVE:
        spread = 2.0**exponent
        edges = np.arange(0, int(9 * spread) + 2) + 0.5
        tail = np.array([erf(edge / (spread * sqrt(2))) for edge in edges])
        positive = np.diff(tail) / 2
        probabilities = np.concatenate(([tail[0]], positive, positive))
        probabilities = probabilities[probabilities > 1e-15]
        entropies.append(float(-(probabilities * np.log2(probabilities)).sum()))
    return np.array(entropies)


def expected_bits(exponents: np.ndarray, shift: float, counts: np.ndarray) -> float:
    """Expected bits of `counts` symbols of spreads 2^`exponents` at steps of 2^`shift`.

    Args:
        exponents: float64 `[m]`.
        shift: binary logarithm of the step.
        counts: int64 `[m]`.
    """
    return float(kernels.expected_bits(exponents, shift, counts, entropy_table(), PACKINGS[0].widest))


def mean_bits(exponents: np.ndarray, shifts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Expected bits of one of the symbols for each of several steps: float64 `[n]`, as `shifts`."""
    bits = np.empty(len(shifts))
    kernels.mean_bits(exponents, shifts, counts, entropy_table(), PACKINGS[0].widest, bits)
    return bits


def finest_step_within(bits: float, low: float, high: float, exponents: np.ndarray, counts: np.ndarray) -> float:
    """The least shift from `low` to `high` with which `expected_bits` are `bits` or less; `high` if none is."""
    table, unsent = entropy_table(), PACKINGS[0].widest
    return float(kernels.finest_within(bits, low, high, CLOSE_ENOUGH, exponents, counts, table, unsent))
