"""How fine the tokens of a segment are coded."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from spectrumkv.common.kv.codecs.spectral.layout import CLASSES_PER_OCTAVE, LOWEST_CLASS, STEP_CLASSES
from spectrumkv.common.kv.codecs.spectral.symbols import edges


@dataclass(frozen=True, eq=False)
class TokenClasses:
    """How fine the tokens of a segment are relative to each other.

    Attributes:
        classes: int64 `[n]`, from LOWEST_CLASS to HIGHEST_CLASS; sinks have one too, which nobody looks at.
        sinks: how many of the first tokens are sent in the 16-bit dtype.
    """

    classes: np.ndarray
    sinks: int

    @cached_property
    def coded(self) -> np.ndarray:
        """uint8 `[n − sinks]`: classes of the tokens that have a step, from 0."""
        return (self.classes[self.sinks :] - LOWEST_CLASS).astype(np.uint8)

    @cached_property
    def order(self) -> np.ndarray:
        """int64 `[n − sinks]`: tokens that have a step, counted from the first of them, by rising class."""
        return np.argsort(self.coded, kind="stable")

    @cached_property
    def of_each(self) -> np.ndarray:
        """int64 `[classes]`: how many of these tokens each class has."""
        return np.bincount(self.coded, minlength=len(STEP_CLASSES))

    @cached_property
    def start(self) -> np.ndarray:
        """int64 `[classes + 1]`: the first place of each class in `order`."""
        return edges(self.of_each)


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of a segment's tokens.

    Attributes:
        base: binary logarithm of the step of class 0; a float32, as the body has it.
        tokens: the tokens' classes.
    """

    base: float
    tokens: TokenClasses

    @property
    def of_classes(self) -> np.ndarray:
        """float32: the step of each class."""
        return np.exp2(self.base + STEP_CLASSES / CLASSES_PER_OCTAVE).astype(np.float32)
