"""What a segment's coefficients are expected to be: as calibrated, or as the segment says that its own are.

Prompts differ from the texts of the calibration. Their coefficients have other means and standard deviations, and a
segment of enough tokens says which: that takes a few hundred bytes and saves thousands.
"""

from dataclasses import dataclass
from functools import cached_property
from math import log, sqrt

import numpy as np

from spectrumkv.common.errors import DataLossError
from spectrumkv.common.kv.codecs.spectral.layout import (
    NARROWEST_IN_TRELLIS,
    STEP_CLASSES,
    StreamLayout,
    TokenClasses,
    mean_bits,
    std_classes,
)
from spectrumkv.common.kv.codecs.spectral.symbols import PackedStreams, compress, decompress
from spectrumkv.kernels.spectral.streams import offsets
from spectrumkv.kernels.step_classes import CLASSES_PER_OCTAVE, LOWEST_CLASS

# Means are sent in this many parts of a standard deviation.
MEAN_PARTS = 8
# Largest deviation of a class, in classes, and of a mean, in its parts.
MOST_CLASSES, MOST_PARTS = 64, 127
# A byte of a deviation stands for this much less.
ZERO = 128
# Tokens below which standard deviations are not measured.
FEWEST_TOKENS = 32
# Coefficients whose symbols have standard deviations of this exponent and less save nothing.
LEAST_EXPONENT = -1.0
# Mean squared difference of two classes, in octaves, that their rounding alone may make.
ROUNDING = 1 / (6 * CLASSES_PER_OCTAVE**2)
# Means smaller than this many standard errors are taken for 0.
LEAST_STANDARD_ERRORS = 1.5
# Variances below this one cannot be told from it.
LEAST_VARIANCE = 1e-60


@dataclass(frozen=True, eq=False)
class CoefficientModel:
    """Mean and class of standard deviation of each coefficient, in the order side, head, element.

    Attributes:
        classes: int64 `[rows]`, see `std_classes`.
        mean: float32 `[rows]`, in the basis's units.
    """

    classes: np.ndarray
    mean: np.ndarray

    @classmethod
    def calibrated(cls, std: np.ndarray) -> "CoefficientModel":
        """Return the model of a basis.

        Args:
            std: float32 `[rows]`, standard deviations.

        Returns:
            The model, with means of 0.
        """
        return cls(std_classes(std), np.zeros(len(std), np.float32))

    @cached_property
    def row_order(self) -> np.ndarray:
        """Sort the coefficients by rising class: int64 `[rows]`."""
        return np.argsort(self.classes, kind="stable")

    @cached_property
    def run_start(self) -> np.ndarray:
        """Return where each class that there is starts in `row_order`: int64 `[runs + 1]`."""
        sorted_classes = self.classes[self.row_order]
        starts = np.flatnonzero(np.diff(sorted_classes)) + 1
        return np.concatenate(([0], starts, [len(sorted_classes)])).astype(np.int64)

    @cached_property
    def run_classes(self) -> np.ndarray:
        """Return the classes that there are, rising: int64 `[runs]`."""
        classes: np.ndarray = self.classes[self.row_order[self.run_start[:-1]]]
        return classes

    @cached_property
    def run_rows(self) -> np.ndarray:
        """Count the coefficients of each class: int64 `[runs]`."""
        return np.diff(self.run_start)

    @cached_property
    def streams(self) -> StreamLayout:
        """Lay out which symbols share a stream."""
        return StreamLayout.of(self.run_classes, self.run_rows)

    def mean_bits(self, steps: np.ndarray) -> np.ndarray:
        """Estimate the bits an element that tokens of several steps take.

        Args:
            steps: float64 `[n]`, binary logarithms of the steps.

        Returns:
            float64 `[n]`, bits.
        """
        return mean_bits(self.run_classes / CLASSES_PER_OCTAVE, steps, self.run_rows)


@dataclass(frozen=True, eq=False)
class Quantization:
    """How a segment's coefficients become integers.

    Attributes:
        base: binary logarithm of the step of class 0; a float32, as the body has it.
        tokens: the tokens' classes.
        model: of the coefficients.
    """

    base: float
    tokens: TokenClasses
    model: CoefficientModel

    @property
    def steps(self) -> np.ndarray:
        """Return the step of each class: float32 `[classes]`."""
        return np.exp2(self.base + STEP_CLASSES / CLASSES_PER_OCTAVE).astype(np.float32)

    @cached_property
    def packed(self) -> PackedStreams:
        """Choose how each stream is packed."""
        return self.model.streams.packed(self.tokens.of_each, self.base)

    @cached_property
    def offsets(self) -> np.ndarray:
        """Return where the symbols of each step class and coefficient start: int64 `[classes, rows]`."""
        model, starts = self.model, np.empty((len(STEP_CLASSES), len(self.model.classes)), np.int64)
        streams = model.streams.stream_of, self.packed.start
        offsets(model.row_order, model.run_start, self.tokens.start, *streams, starts)
        return starts

    @cached_property
    def in_trellis(self) -> np.ndarray:
        """Count the tokens, in their order, whose symbols of each coefficient are in the trellis: int64 `[rows]`."""
        last_class = np.floor(self.model.classes - CLASSES_PER_OCTAVE * (NARROWEST_IN_TRELLIS + self.base))
        index = np.clip(last_class - LOWEST_CLASS + 1, 0, len(STEP_CLASSES)).astype(np.int64)
        found: np.ndarray = self.tokens.start[index]
        return found


@dataclass(frozen=True, eq=False)
class Deviation:
    """How a segment's coefficients differ from a calibrated model.

    Attributes:
        classes: int64 `[rows]`, added to the calibrated classes, up to ±`MOST_CLASSES`.
        means: int64 `[rows]`, in parts of the standard deviation that the class stands for, up to ±`MOST_PARTS`.
    """

    classes: np.ndarray
    means: np.ndarray

    @classmethod
    def measured(
        cls, calibrated: CoefficientModel, sums: np.ndarray, squares: np.ndarray, tokens: int
    ) -> "Deviation":
        """Find the deviation of some tokens.

        Args:
            calibrated: the basis's model.
            sums: float64 `[rows]`, of each coefficient over the tokens; finite.
            squares: float64 `[rows]`, of each coefficient's square; finite.
            tokens: how many.

        Returns:
            The deviation.
        """
        mean = sums / tokens
        variance = np.maximum(squares / tokens - mean * mean, LEAST_VARIANCE)
        # A mean may be of so many parts only: where it is larger, the class is, too.
        least = np.ceil(
            CLASSES_PER_OCTAVE * np.log2(np.maximum(np.abs(mean), LEAST_VARIANCE) * MEAN_PARTS / MOST_PARTS)
        )
        classes = np.maximum(np.rint(CLASSES_PER_OCTAVE / 2 * np.log2(variance)), least).astype(np.int64)
        classes = np.clip(classes - calibrated.classes, -MOST_CLASSES, MOST_CLASSES)
        part = _parts(calibrated.classes + classes)
        mean[np.abs(mean) < LEAST_STANDARD_ERRORS * MEAN_PARTS * part / sqrt(tokens)] = 0
        means = np.clip(np.rint(mean / part), -MOST_PARTS, MOST_PARTS).astype(np.int64)
        return cls(classes, means)

    def of(self, calibrated: CoefficientModel) -> CoefficientModel:
        """Return the model of the segment's own coefficients."""
        classes = calibrated.classes + self.classes
        return CoefficientModel(classes, (self.means * _parts(classes)).astype(np.float32))

    def saved_bits(self, model: CoefficientModel, base: float) -> float:
        """Estimate what a token of class 0 takes less for it.

        A mean μ adds log₂(1 + μ²/σ²)/2 bits to what a Gaussian takes. A code for a standard deviation that is δ
        octaves off takes about ln 2 · δ² more (Cover & Thomas, "Elements of Information Theory", theorem 5.4.3, to
        second order); what all coefficients have in common costs nothing, since streams are coded by what is in them.

        Args:
            model: see `of`.
            base: binary logarithm of the step of class 0.

        Returns:
            Bits.
        """
        sent = model.classes / CLASSES_PER_OCTAVE - base > LEAST_EXPONENT
        if not sent.any():
            return 0.0
        octaves = self.classes[sent] / CLASSES_PER_OCTAVE
        means = self.means[sent] / MEAN_PARTS
        variance = max(0.0, float(octaves.var()) - ROUNDING)
        return float(0.5 * np.log2(1 + means * means).sum() + log(2) * len(octaves) * variance)

    @cached_property
    def coded(self) -> bytes:
        """Return the deviation as a body has it."""
        return compress((np.concatenate((self.classes, self.means)) + ZERO).astype(np.uint8))

    @classmethod
    def decoded(cls, coded: memoryview, rows: int) -> "Deviation":
        """Read a deviation; the inverse of `coded`.

        Args:
            coded: as a body has it.
            rows: how many coefficients there are.

        Returns:
            The deviation.

        Raises:
            DataLossError: `coded` holds none.
        """
        levels = decompress(coded, 2 * rows).astype(np.int64) - ZERO
        classes, means = levels[:rows], levels[rows:]
        if rows and np.abs(classes).max() > MOST_CLASSES:
            raise DataLossError(
                f"a coefficient's class deviates by {classes[np.abs(classes).argmax()]}; at most {MOST_CLASSES} are "
                "allowed",
                "malformed",
            )
        return cls(classes, means)


def _parts(classes: np.ndarray) -> np.ndarray:
    """Return what means are counted in: float64, of the shape of `classes`."""
    parts: np.ndarray = np.exp2(classes / CLASSES_PER_OCTAVE) / MEAN_PARTS
    return parts
