"""Meets a byte budget: how fine the steps of each layer may be.

All layers should have the same base step, since the basis measures errors of all of them alike: with one distortion
for all components the distortion at a rate is least (reverse water-filling, Cover & Thomas, "Elements of Information
Theory", section 13.3.3 of the first edition, 10.3.3 of the second). A prompt's layers leave one by one, though,
before the later ones are known: the later ones are taken to be like the present one, and the layers that are left
make up for what came out differently.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.kv.codecs.spectral.layout import (
    CLASSES_PER_OCTAVE,
    HIGHEST_CLASS,
    LOWEST_CLASS,
    expected_bits,
    finest_step_within,
    std_classes,
)

# Steps of a layer's mean token are sought from its largest standard deviation / 2^24 to 2^10 times that.
FINEST, COARSEST = -24.0, 10.0
# Fraction of its budget, or of the whole prompt's if that is more, that the last layer may leave unused.
LEFT_OF_LAYER, LEFT_OF_BUDGET = 0.015, 0.001
# How often the last layer may be coded to get there.
LAST_LAYER_ATTEMPTS = 10
# Added to the expected move of the base, in octaves, while all bases tried lie on one side of the budget.
MOVE_BEYOND = 0.25
# Fraction of the budget that layers before the last one aim at.
AIM = 0.999


@dataclass
class RateControl:
    """What spends the byte budget of one request, layer by layer.

    Attributes:
        segment_bytes: for all layers' segments.
        basis: of the model.
        correction: actual ÷ expected bytes so far, smoothed; expectations are scaled by it.
        spent_bytes: by the layers that are done.
        done: how many layers are done.
    """

    segment_bytes: int
    basis: SpectralBasis
    correction: float = 1.03
    spent_bytes: int = 0
    done: int = 0
    _widest: np.ndarray = field(init=False)
    _rows: np.ndarray = field(init=False)
    _rows_from: np.ndarray = field(init=False)
    _lowest: int = field(init=False)

    def __post_init__(self) -> None:
        stds = self.basis.std.flatten(1).numpy()
        self._widest = np.log2(stds.max(axis=1))
        classes = [std_classes(std) for std in stds]
        self._lowest = int(min(one.min() for one in classes))
        width = int(max(one.max() for one in classes)) - self._lowest + 1
        self._rows = np.stack([np.bincount(one - self._lowest, minlength=width) for one in classes])
        self._rows_from = self._rows[::-1].cumsum(axis=0)[::-1]

    @property
    def left_bytes(self) -> int:
        """Return the bytes that are left of the budget."""
        return self.segment_bytes - self.spent_bytes

    @property
    def may_be_left(self) -> float:
        """Return the bytes that the last layer need not use up."""
        return max(LEFT_OF_LAYER * self.left_bytes, LEFT_OF_BUDGET * self.segment_bytes)

    @property
    def finest(self) -> float:
        """Return the least base step of the next layer."""
        return float(np.float32(self._widest[self.done] + FINEST))

    @property
    def coarsest(self) -> float:
        """Return the largest base step of the next layer."""
        return float(np.float32(self._widest[self.done] + COARSEST))

    def base(self, classes: np.ndarray, fixed_bytes: int) -> float:
        """Find the base step with which this and all later layers together take what is left.

        Args:
            classes: int64 `[n]`, step classes of this layer's tokens, sinks left out.
            fixed_bytes: that a layer takes whatever its steps.

        Returns:
            Binary logarithm of the step of class 0, a float32.
        """
        counts = self._streams(self._rows_from[self.done], classes)
        remaining = len(self._rows) - self.done
        aim = self.left_bytes * AIM if remaining > 1 else self.left_bytes - self.may_be_left / 2
        available = 8 * (aim - remaining * fixed_bytes) / self.correction
        base = finest_step_within(available, self.finest, self.coarsest, self._exponents, counts)
        return float(np.float32(base))

    def expected_bytes(self, classes: np.ndarray, base: float, fixed_bytes: int) -> float:
        """Estimate what this layer takes, before correction.

        Args:
            classes: int64 `[n]`, step classes of its tokens, sinks left out.
            base: binary logarithm of the step of class 0.
            fixed_bytes: that a layer takes whatever its steps.

        Returns:
            Bytes.
        """
        counts = self._streams(self._rows[self.done], classes)
        return fixed_bytes + expected_bits(self._exponents, base, counts) / 8

    @cached_property
    def _exponents(self) -> np.ndarray:
        """Return the binary logarithm of every stream's standard deviation where the step of class 0 is 1."""
        first = self._lowest - HIGHEST_CLASS
        streams = self._rows.shape[1] + HIGHEST_CLASS - LOWEST_CLASS
        exponents: np.ndarray = np.arange(first, first + streams) / CLASSES_PER_OCTAVE
        return exponents

    @staticmethod
    def _streams(rows: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Return the symbols of each stream: a stream is a difference between the classes of rows and of tokens."""
        tokens = np.bincount(classes - LOWEST_CLASS, minlength=HIGHEST_CLASS - LOWEST_CLASS + 1)
        return np.convolve(rows, tokens[::-1])

    def account(self, actual_bytes: int, expected_bytes: float) -> None:
        """Take note that a layer is done.

        Args:
            actual_bytes: that its segments took.
            expected_bytes: see `expected_bytes`.
        """
        self.spent_bytes += actual_bytes
        self.done += 1
        if expected_bytes > 0:
            self.correction += (actual_bytes / expected_bytes - self.correction) / 2


@dataclass
class BaseSearch:
    """A bracket around the base step at which the last layer takes what is left of the budget and no more.

    Attributes:
        left_bytes: of the budget.
        may_be_left: how much of it need not be used up.
        symbols: of the layer; one unit of the base is about one bit of each.
        finest: the least base.
        coarsest: the largest base.
        attempts: how often a base may be tried.
        fits: the finest base that kept to the budget, and the bytes that it took.
        exceeds: the coarsest base that did not, likewise.
    """

    left_bytes: int
    may_be_left: float
    symbols: int
    finest: float
    coarsest: float
    attempts: int = LAST_LAYER_ATTEMPTS
    fits: tuple[float, int] | None = None
    exceeds: tuple[float, int] | None = None

    def tried(self, base: float, size: int) -> bool:
        """Take note of what came of a base.

        Args:
            base: that was tried.
            size: bytes that the layer took with it.

        Returns:
            Whether the search is over: the size is good enough, or there is nothing left to try.
        """
        self.attempts -= 1
        if size > self.left_bytes:
            self.exceeds = (base, size)
            # A budget that nothing meets is exceeded in the end; one that something meets never is.
            return base >= self.coarsest or (self.fits is not None and self.attempts <= 0)
        if self.fits is None or size > self.fits[1]:
            self.fits = (base, size)
        return size >= self.left_bytes - self.may_be_left or base <= self.finest or self.attempts <= 0

    def is_best(self, base: float) -> bool:
        """Return whether a base is the best one tried so far."""
        return self.fits is not None and self.fits[0] == base

    def next_base(self) -> float:
        """Return the base to try next: between what fits and what exceeds, or beyond what was tried."""
        aim = self.left_bytes - self.may_be_left / 2
        if self.fits is not None and self.exceeds is not None:
            share = (aim - self.fits[1]) / (self.exceeds[1] - self.fits[1])
            share = min(max(share, 0.1), 0.9)
            return float(np.float32(self.fits[0] + share * (self.exceeds[0] - self.fits[0])))
        base, size = self.fits or self.exceeds or (0.0, 0)
        move = 8 * (size - aim) / self.symbols
        move = move + math.copysign(MOVE_BEYOND, move)
        return float(np.float32(min(max(self.finest, base + move), self.coarsest)))
