"""Which symbols share a stream: those of one difference between spread class and step class.

A coefficient of spread σ (in the basis's units) in a token of step s has symbols of standard deviation σ / s. With
both classes in half octaves, symbols of one difference are alike, and each pair of classes is a rectangle of the
matrix of symbols once tokens and coefficients are sorted by class.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import erf, sqrt

import numpy as np

from spectrumkv.common.kv.spectral.symbols import PACKINGS

# Classes per octave of step and of spread.
CLASSES_PER_OCTAVE = 2


def spread_classes(spread: np.ndarray) -> np.ndarray:
    """Class of each coefficient: int64, its spread's logarithm in half octaves."""
    classes: np.ndarray = np.rint(CLASSES_PER_OCTAVE * np.log2(spread)).astype(np.int64)
    return classes


def relative_spread(stream: int, base: float) -> float:
    """Binary logarithm of the standard deviation, in steps, of the symbols of a stream.

    Exact, so that both sides pack a stream alike whatever machines they are.

    Args:
        stream: spread class minus step class.
        base: binary logarithm of the step of class 0, a float32.
    """
    return stream / CLASSES_PER_OCTAVE - base


@dataclass(frozen=True)
class Run:
    """Neighbouring rows or columns of one class."""

    klass: int
    start: int
    end: int


def runs(sorted_classes: np.ndarray) -> list[Run]:
    """The runs of equal values in a sorted array."""
    edges = np.flatnonzero(np.diff(sorted_classes)) + 1
    bounds = [0, *edges.tolist(), len(sorted_classes)]
    return [Run(int(sorted_classes[start]), start, end) for start, end in pairwise(bounds) if end > start]


def streams(rows: list[Run], columns: list[Run]) -> Iterator[tuple[int, list[tuple[Run, Run]]]]:
    """Yield each stream, from the narrowest symbols to the widest, with its rectangles (row run, column run)."""
    by_stream: dict[int, list[tuple[Run, Run]]] = {}
    for row in rows:
        for column in columns:
            by_stream.setdefault(column.klass - row.klass, []).append((row, column))
    yield from sorted(by_stream.items())


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
