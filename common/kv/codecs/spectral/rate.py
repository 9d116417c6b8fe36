"""Meets a byte budget: how fine the steps of each layer may be.

All layers should have the same base step, since the basis measures errors of all of them alike: with one distortion
for all components the distortion at a rate is least (reverse water-filling, Cover & Thomas, "Elements of Information
Theory", section 13.3.3 of the first edition, 10.3.3 of the second). A prompt's layers leave one by one, though,
before the later ones are known: the later ones are taken to be like those so far, and to differ as much from their
calibration, and the layers that are left make up for what came out differently.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.codecs.spectral.layout import expected_bits, finest_step_within, std_classes
from spectrumkv.common.kv.codecs.spectral.segment_codec import UncodedSegment
from spectrumkv.kernels.step_classes import CLASSES_PER_OCTAVE, HIGHEST_CLASS, LOWEST_CLASS

# Steps of a layer's mean token are sought from its largest standard deviation / 2^24 to 2^10 times that.
FINEST, COARSEST = -24.0, 10.0
# Fraction of its budget, or of the whole prompt's if that is more, that the last layer may leave unused.
LEFT_OF_LAYER, LEFT_OF_BUDGET = 0.015, 0.001
# How often the last layer may be coded to get there.
LAST_LAYER_ATTEMPTS = 10
# Added to the expected move of the base, in octaves, while all bases tried lie on one side of the budget.
MOVE_BEYOND = 0.25
# Fraction of the budget that layers before the last one aim at: models' last layers differ most from the calibration.
AIM = 0.99


@dataclass(frozen=True, eq=False)
class LayerSymbols:
    """What a layer's symbols are like.

    Attributes:
        tokens: int64 `[classes]`, how many tokens have each step class; sinks are left out.
        exponents: float64 `[m]`, binary logarithms of standard deviations where the step of class 0 is 1.
        counts: int64 `[m]`, symbols of each.
        deviation: octaves by which standard deviations exceed the calibrated ones, in the mean of all coefficients.
    """

    tokens: np.ndarray
    exponents: np.ndarray
    counts: np.ndarray
    deviation: float

    @classmethod
    def of(cls, segments: Sequence[UncodedSegment]) -> "LayerSymbols":
        """Return what the symbols of a layer's segments are like."""
        tokens = [one.tokens.of_each for one in segments]
        streams = [one.measured.streams for one in segments]
        deviations = [0.0 if one.deviation is None else float(one.deviation.classes.mean()) for one in segments]
        return cls(
            tokens=np.sum(tokens, axis=0),
            exponents=np.concatenate([one.exponent for one in streams]),
            counts=np.concatenate([one.rows @ own for one, own in zip(streams, tokens, strict=True)]),
            deviation=float(np.mean(deviations)) / CLASSES_PER_OCTAVE,
        )


@dataclass
class RateControl:
    """What spends the byte budget of one request, layer by layer.

    Attributes:
        segment_bytes: for all layers' segments.
        basis: of the model.
        correction: actual ÷ expected bytes so far, smoothed; expectations are scaled by it.
        deviation: octaves by which later layers' standard deviations are taken to exceed the calibrated ones: that of
            the layers so far, smoothed; None before the first one.
        tokens: int64 `[classes]`, tokens of each step class in the layers so far and in the next, together.
        spent_bytes: by the layers that are done.
        done: how many layers are done.
    """

    segment_bytes: int
    basis: CalibratedBasis
    correction: float = 1.03
    spent_bytes: int = 0
    done: int = 0
    deviation: float | None = None
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(HIGHEST_CLASS - LOWEST_CLASS + 1, np.int64))
    _widest: np.ndarray = field(init=False)
    _rows: np.ndarray = field(init=False)
    _rows_after: np.ndarray = field(init=False)
    _lowest: int = field(init=False)

    def __post_init__(self) -> None:
        stds = self.basis.std.flatten(1).numpy()
        self._widest = np.log2(stds.max(axis=1))
        classes = [std_classes(std) for std in stds]
        self._lowest = int(min(one.min() for one in classes))
        width = int(max(one.max() for one in classes)) - self._lowest + 1
        self._rows = np.stack([np.bincount(one - self._lowest, minlength=width) for one in classes])
        after = self._rows[::-1].cumsum(axis=0)[::-1][1:]
        self._rows_after = np.concatenate((after, np.zeros_like(self._rows[:1])))

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

    def base(self, layer: LayerSymbols, fixed_bytes: int) -> float:
        """Find the base step with which this and all later layers together take what is left.

        Args:
            layer: this one.
            fixed_bytes: that a layer takes whatever its steps.

        Returns:
            Binary logarithm of the step of class 0, a float32.
        """
        self.deviation = layer.deviation if self.deviation is None else (self.deviation + layer.deviation) / 2
        self.tokens += layer.tokens
        exponents = np.concatenate((layer.exponents, self._exponents + self.deviation))
        # A stream is a difference between the classes of rows and of tokens. Of later layers' tokens the classes are
        # taken to be those of all layers so far.
        later = np.convolve(self._rows_after[self.done], self.tokens[::-1]) // (self.done + 1)
        remaining = len(self._rows) - self.done
        aim = self.left_bytes * AIM if remaining > 1 else self.left_bytes - self.may_be_left / 2
        available = 8 * (aim - remaining * fixed_bytes) / self.correction
        counts = np.concatenate((layer.counts, later))
        return float(np.float32(finest_step_within(available, self.finest, self.coarsest, exponents, counts)))

    @staticmethod
    def expected_bytes(layer: LayerSymbols, base: float, fixed_bytes: int) -> float:
        """Estimate what a layer takes, before correction.

        Args:
            layer: the layer.
            base: binary logarithm of the step of class 0.
            fixed_bytes: that a layer takes whatever its steps.

        Returns:
            Bytes.
        """
        return fixed_bytes + expected_bits(layer.exponents, base, layer.counts) / 8

    @cached_property
    def _exponents(self) -> np.ndarray:
        """Return the binary logarithm of every stream's standard deviation where the step of class 0 is 1."""
        first = self._lowest - HIGHEST_CLASS
        streams = self._rows.shape[1] + HIGHEST_CLASS - LOWEST_CLASS
        exponents: np.ndarray = np.arange(first, first + streams) / CLASSES_PER_OCTAVE
        return exponents

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
