"""Which symbols share a stream: those of one difference between spread class and step class.

A coefficient of spread σ (in the basis's units) in a token of step s has symbols of standard deviation σ / s. With
both classes in half octaves, symbols of one difference are alike.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import erf, sqrt

import numpy as np

from spectrumkv.common.kv.spectral.symbols import PACKINGS

# Classes per octave of step and of spread.
CLASSES_PER_OCTAVE = 2
# Step classes around the mean token: three octaves finer, one and a half coarser.
LOWEST_CLASS, HIGHEST_CLASS = -6, 3
STEP_CLASSES = np.arange(LOWEST_CLASS, HIGHEST_CLASS + 1)


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
        return cls(exponent, np.concatenate(([0], np.cumsum(counts))), difference - lowest)

    def __iter__(self) -> Iterator[tuple[float, int, int]]:
        """Exponent, start and end of each stream."""
        bounds = self.start.tolist()
        return zip(self.exponent.tolist(), bounds[:-1], bounds[1:], strict=True)


@lru_cache(maxsize=1)
def _entropy_table() -> np.ndarray:
    """Entropy in bits of a Gaussian rounded to integers, for spreads of 2^-6 … 2^6 in 64ths of an octave."""
    entropies = []
    for exponent in np.arange(-6 * 64, 6 * 64 + 1) / 64:
        spread = 2.0**exponent
        edges = np.arange(0, int(9 * spread) + 2) + 0.5
        tail = np.array([erf(edge / (spread * sqrt(2))) for edge in edges])
        positive = np.diff(tail) / 2
        probabilities = np.concatenate(([tail[0]], positive, positive))
        probabilities = probabilities[probabilities > 1e-15]
        entropies.append(float(-(probabilities * np.log2(probabilities)).sum()))
    return np.array(entropies)


def expected_bits(exponent: np.ndarray) -> np.ndarray:
    """Entropy in bits of a symbol whose standard deviation is 2^`exponent` steps.

    Nothing where such symbols are not sent, and for wide ones the high-rate formula log2(σ √(2πe)).
    """
    clipped = np.clip(exponent, -6, 6)
    bits = np.interp(clipped, np.arange(-6 * 64, 6 * 64 + 1) / 64, _entropy_table()) + np.maximum(exponent - 6, 0)
    silent = exponent <= PACKINGS[0].widest
    result: np.ndarray = np.where(silent, 0.0, bits)
    return result


def mean_bits(classes: np.ndarray, rows: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Expected bits an element of tokens with these steps.

    Args:
        classes: `[runs]`, spread classes of a layer.
        rows: `[runs]`, how many coefficients have each.
        steps: `[n]`, binary logarithms.

    Returns:
        float64 `[n]`.
    """
    exponents = classes[None, :] / CLASSES_PER_OCTAVE - steps[:, None]
    bits: np.ndarray = expected_bits(exponents) @ rows / rows.sum()
    return bits
