"""Meets a byte budget: how fine the steps of each layer may be.

As in codec "spectral", all layers should have the same base step, and layers leave before the later ones are known.
The later ones are taken to have this layer's tokens and their own calibrated standard deviations, moved by as much as
the standard deviations of the layers so far differ from calibration. What records take follows from that exactly;
escapes are foreseen from the layers before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from spectrumkv.common.kv.codecs.fixed_rate.segment_codec import ESCAPE_BYTES, WORD_BYTES, LayerSteps
from spectrumkv.common.kv.codecs.fixed_rate.transform import LayerTransform
from spectrumkv.kernels.fixed_rate import rate as kernels
from spectrumkv.kernels.fixed_rate.layout import (
    HIGHEST_BASE,
    LOWEST_BASE,
    LOWEST_PROFILE,
    PROFILES,
    RATIO_UNITS,
    WIDTH_THRESHOLDS,
)

# Later layers' standard deviations are sorted into quarter octaves, as profiles are.
QUARTER = RATIO_UNITS // 4
# How often the last layer may be coded.
LAST_LAYER_ATTEMPTS = 8
# Fraction of what is left that layers before the last one aim at: what the last layers take is foreseen worst.
AIM = 0.992
# Bytes of escapes for each byte of records, before any layer is done.
ESCAPE_SHARE = 0.01
PROFILE_RATIOS = QUARTER * (LOWEST_PROFILE + np.arange(PROFILES))


@dataclass(frozen=True, eq=False)
class LayerDemand:
    """What the records of one layer take, whatever the base.

    Attributes:
        group_exponents: int64 `[groups]`, of each segment.
        profiles: int64 `[PROFILES]`, how many tokens of each segment have each profile.
        fixed_bytes: of its segments, without records and escapes.
    """

    group_exponents: Sequence[np.ndarray]
    profiles: Sequence[np.ndarray]
    fixed_bytes: int

    @cached_property
    def ratios(self) -> tuple[np.ndarray, np.ndarray]:
        """Return what ratios there are at base 0, and how many groups have each: int64 `[m]` twice."""
        ratio = [(one[:, None] + PROFILE_RATIOS).ravel() for one in self.group_exponents]
        count = [
            np.broadcast_to(counts, (len(groups), PROFILES)).ravel()
            for groups, counts in zip(self.group_exponents, self.profiles, strict=True)
        ]
        empty = [np.zeros(0, np.int64)]
        return np.concatenate(ratio or empty), np.concatenate(count or empty)

    def finest_base(self, words: int) -> int:
        """Return the finest base at which the layer's records keep to a number of words.

        Args:
            words: that they may take.
        """
        return finest_base(words, *self.ratios)


@dataclass(frozen=True, eq=False)
class LaterGroups:
    """The groups of rows of the layers after each one, by their calibrated exponents.

    Attributes:
        counts: int64 `[layers, quarters]`, how many there are in each quarter octave.
        lowest: quarter octave of the first ones.
    """

    counts: np.ndarray
    lowest: int


def later_groups(transforms: Sequence[LayerTransform]) -> LaterGroups:
    """Return the groups of the layers after each one.

    Args:
        transforms: of all layers.
    """
    quarters = [one.calibrated.group_exponents // QUARTER for one in transforms]
    lowest = int(min(one.min() for one in quarters))
    width = int(max(one.max() for one in quarters)) - lowest + 1
    counts = np.stack([np.bincount(one - lowest, minlength=width) for one in quarters])
    return LaterGroups(counts[::-1].cumsum(axis=0)[::-1] - counts, lowest)


@dataclass
class RateControl:
    """What spends the byte budget of one request, layer by layer.

    Attributes:
        segment_bytes: for all layers' segments.
        transforms: of all layers.
        drift: by how much standard deviations lie above the calibrated ones, in `RATIO_UNITS`, smoothed.
        escape_share: bytes of escapes for each byte of records, smoothed.
        smooth_base: base of the layers so far, smoothed, since a layer foresees roughly; None before the first.
        spent_bytes: by the layers that are done.
        done: how many layers are done.
    """

    segment_bytes: int
    transforms: Sequence[LayerTransform]
    drift: float = 0.0
    escape_share: float = ESCAPE_SHARE
    smooth_base: float | None = None
    spent_bytes: int = 0
    done: int = 0
    _later: LaterGroups = field(init=False)

    def __post_init__(self) -> None:
        self._later = later_groups(self.transforms)

    @property
    def left_bytes(self) -> int:
        """Return the bytes that are left of the budget."""
        return self.segment_bytes - self.spent_bytes

    @property
    def is_last(self) -> bool:
        """Tell whether the next layer is the last one."""
        return self.done == len(self.transforms) - 1

    def base(self, demand: LayerDemand) -> int:
        """Find the finest base with which this and all later layers together take what is left.

        Args:
            demand: of the layer, which is not the last one.

        Returns:
            The base.
        """
        ratio, count = (np.concatenate(pair) for pair in zip(demand.ratios, self._later_demand(demand), strict=True))
        found = finest_base(self.expected_words(demand.fixed_bytes), ratio, count)
        start = found if self.smooth_base is None else self.smooth_base
        self.smooth_base = start + (found - start) * self.base_weight
        return round(self.smooth_base)

    def expected_words(self, fixed_bytes: int) -> int:
        """Return the words that the records of this and all later layers are expected to leave room for.

        Args:
            fixed_bytes: of the layer's segments without records and escapes. Later ones are taken to have as many.
        """
        remaining, aim = len(self.transforms) - self.done, 1.0 if self.is_last else AIM
        return int((self.left_bytes * aim - remaining * fixed_bytes) / (1 + self.escape_share)) // WORD_BYTES

    @property
    def base_weight(self) -> float:
        """Return with which weight the base that the next layer foresees counts; the last one foresees nothing."""
        return 1.0 if self.smooth_base is None or self.is_last else 1 / 3

    @property
    def drift_weight(self) -> float:
        """Return with which weight the next layer's drift counts."""
        return 1.0 if self.done == 0 else 0.5

    def is_better(self, wire_bytes: int, other: int) -> bool:
        """Return whether a size of the last layer is a better one: the largest within the budget, or the least."""
        if max(wire_bytes, other) <= self.left_bytes:
            return wire_bytes > other
        return wire_bytes < other

    def _later_demand(self, demand: LayerDemand) -> tuple[np.ndarray, np.ndarray]:
        """Return what the layers after this one take; see `LayerDemand.ratios`."""
        rows, profiles = self._later.counts[self.done], np.sum(demand.profiles, axis=0, dtype=np.int64)
        count = np.convolve(rows, profiles)
        quarters = self._later.lowest + LOWEST_PROFILE + np.arange(len(count))
        return QUARTER * quarters + QUARTER // 2 + round(self.drift), count

    def observe(self, demand: LayerDemand) -> None:
        """Take note of how a layer's standard deviations differ from the calibrated ones.

        Args:
            demand: of the next layer.
        """
        calibrated = self.transforms[self.done].calibrated.group_exponents
        if demand.group_exponents:
            drift = float(np.mean([np.mean(one - calibrated) for one in demand.group_exponents]))
            self.drift += (drift - self.drift) * self.drift_weight

    def account(self, actual_bytes: int, records: int, escapes: int) -> None:
        """Take note that a layer is done.

        Args:
            actual_bytes: that its segments took.
            records: words of its records.
            escapes: how many it has.
        """
        self.spent_bytes += actual_bytes
        self.done += 1
        if records:
            share = ESCAPE_BYTES * escapes / (WORD_BYTES * records)
            self.escape_share += (share - self.escape_share) / 2


@dataclass
class StepSearch:
    """A bracket around the steps at which the last layer takes what is left of the budget and no more.

    Attributes:
        tokens: of the prompt.
        left_bytes: of the budget.
        may_be_left: how much of it need not be used up.
        attempts: how often steps may be tried.
        fits: the finest steps that kept to the budget; None before any did.
        exceeds: the coarsest ones that did not.
    """

    tokens: int
    left_bytes: int
    may_be_left: float
    attempts: int = LAST_LAYER_ATTEMPTS
    fits: int | None = None
    exceeds: int | None = None

    def tried(self, steps: LayerSteps, size: int) -> bool:
        """Take note of what came of steps.

        Args:
            steps: that were tried.
            size: bytes that the layer took with them.

        Returns:
            Whether the search is over: the size is good enough, or there is nothing left to try.
        """
        self.attempts -= 1
        level = self._level(steps)
        if size > self.left_bytes:
            self.exceeds = level if self.exceeds is None else max(self.exceeds, level)
        else:
            self.fits = level if self.fits is None else min(self.fits, level)
            if size >= self.left_bytes - self.may_be_left:
                return True
        closed = self.fits is not None and self.exceeds is not None and self.fits - self.exceeds <= 1
        return closed or self.attempts <= 0

    def next_steps(self, wanted: LayerSteps) -> LayerSteps:
        """Return the steps to try next: those that are wanted, if they lie between what fits and what exceeds.

        Args:
            wanted: where the records alone would have the right size.
        """
        level = self._level(wanted)
        if self.fits is None:
            level = max(level, (self.exceeds or 0) + self._stride)
        elif self.exceeds is None:
            level = min(level, self.fits - self._stride)
        elif not self.exceeds < level < self.fits:
            level = (self.exceeds + self.fits) // 2
        base = min(max(level // self.tokens, LOWEST_BASE), HIGHEST_BASE)
        return LayerSteps(base, (base + 1) * self.tokens - level)

    @property
    def _stride(self) -> int:
        """Return how far apart levels are tried while all of them lie on one side of the budget."""
        return self.tokens // 4 + 1

    def _level(self, steps: LayerSteps) -> int:
        """Return the number of steps, from fine to coarse: each token with a coarser base is one more."""
        return (steps.base + 1) * self.tokens - steps.turn


def finest_base(words: int, ratio: np.ndarray, count: np.ndarray) -> int:
    """Return the finest base at which records keep to a number of words.

    Args:
        words: that they may take.
        ratio: int64 `[m]`, standard deviations at base 0; see `LayerDemand.ratios`.
        count: int64 `[m]`, how many groups have each.

    Returns:
        The base; 0 where there are no groups.
    """
    if not len(ratio):
        return 0
    finest, coarsest = int(ratio.min()) - int(WIDTH_THRESHOLDS[-1]), int(ratio.max()) - int(WIDTH_THRESHOLDS[0])
    low, high = (min(max(one, LOWEST_BASE), HIGHEST_BASE) for one in (finest // 2 - 1, coarsest // 2 + 1))
    return int(kernels.finest_base(words, low, high, ratio, count, WIDTH_THRESHOLDS))
