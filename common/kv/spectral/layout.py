"""Which symbols share a stream: those of one difference between spread class and step class.

A coefficient of spread σ (in the basis's units) in a token of step s has symbols of standard deviation σ / s. With
both classes in half octaves, symbols of one difference are alike.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import erf, sqrt

import numpy as np

from spectrumkv.common.kv.spectral.symbols import PACKINGS, PackedStreams, edges

# Classes per octave of step and of spread.
CLASSES_PER_OCTAVE = 2
# Step classes around the mean token: three octaves finer, one and a half coarser.
LOWEST_CLASS, HIGHEST_CLASS = -6, 3
STEP_CLASSES = np.arange(LOWEST_CLASS, HIGHEST_CLASS + 1)

# Octaves beyond the entropy table in which the high-rate formula is needed.
WIDE = 1024.0


def spread_classes(spread: np.ndarray) -> np.ndarray:
    """Class of each coefficient: int64, its spread's logarithm in half octaves."""
    classes: np.ndarray = np.rint(CLASSES_PER_OCTAVE * np.log2(spread)).astype(np.int64)
    return classes


@dataclass(frozen=True, eq=False)
class Streams:
    """How the symbols of a block divide into streams, from the narrowest to the widest.

    Attributes:
        exponent: float64 `[streams]`, binary logarithm of the standard deviation of a stream's symbols, in steps.
            Exact, so that both sides pack a stream alike whatever machines they are.
        start: int64 `[streams + 1]`, where each stream lies among all symbols.
        stream_of: int64 `[classes, runs]`, the stream of a token's step class (from `LOWEST_CLASS`) and a run.
    """

    exponent: np.ndarray
    start: np.ndarray
    stream_of: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, base: float, run_classes: np.ndarray, run_start: np.ndarray) -> "Streams":
        """Divide the symbols of a block.

        Args:
            rows: int64 `[classes]`, how many tokens have each step class.
            base: binary logarithm of the step of class 0, a float32.
            run_classes: int64 `[runs]`, spread classes, rising.
            run_start: int64 `[runs + 1]`, the first column of each.
        """
        difference = run_classes[None, :] - STEP_CLASSES[:, None]
        lowest = int(difference.min())
        symbols = rows[:, None] * np.diff(run_start)[None, :]
        counts = np.bincount((difference - lowest).ravel(), symbols.ravel()).astype(np.int64)
        exponent = (np.arange(len(counts)) + lowest) / CLASSES_PER_OCTAVE - base
        return cls(exponent, edges(counts), difference - lowest)

    @cached_property
    def packed(self) -> PackedStreams:
        """How the streams are packed."""
        return PackedStreams.of(self.start, self.exponent)


@lru_cache(maxsize=1)
def _entropy_table() -> tuple[np.ndarray, np.ndarray]:
    """Entropy in bits of a Gaussian rounded to integers: spreads' exponents of two, and the entropies of those.

    In 64ths of an octave from 2^-6 to 2^6, and beyond by the high-rate formula, log2(σ √(2πe)).
    """
    exponents = np.arange(-6 * 64, 6 * 64 + 1) / 64
    entropies = []
    for exponent in exponents:
        spread = 2.0**exponent
        edges = np.arange(0, int(9 * spread) + 2) + 0.5
        tail = np.array([erf(edge / (spread * sqrt(2))) for edge in edges])
        positive = np.diff(tail) / 2
        probabilities = np.concatenate(([tail[0]], positive, positive))
        probabilities = probabilities[probabilities > 1e-15]
        entropies.append(float(-(probabilities * np.log2(probabilities)).sum()))
    return np.append(exponents, exponents[-1] + WIDE), np.append(entropies, entropies[-1] + WIDE)


def expected_bits(exponent: np.ndarray) -> np.ndarray:
    """Entropy in bits of a symbol whose standard deviation is 2^`exponent` steps; 0 where such are not sent."""
    bits: np.ndarray = np.interp(exponent, *_entropy_table())
    bits[exponent <= PACKINGS[0].widest] = 0.0
    return bits
