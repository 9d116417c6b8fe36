"""How the records of a segment are laid out: integers only, so that both sides agree whatever machines they are.

A segment is a run of tokens of one layer. What is sent beside its records says how fine each coefficient of each
token is; from that, and from nothing else, both sides derive the order of the rows, the width of every group of rows,
and where every token's record starts. A row is one coefficient of one head, in the order side, head, element.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from spectrumkv.kernels.step_classes import HIGHEST_CLASS, LOWEST_CLASS

# Rows that share a width: as many as a word of a bit plane has bits.
GROUP_ROWS = 32
# A token's gain, in quarter octaves, has four bits, as its step class does.
LOWEST_GAIN, HIGHEST_GAIN = -8, 7
# A token's profile, its gain minus twice its class, is all that widths need of it.
LOWEST_PROFILE = LOWEST_GAIN - 2 * HIGHEST_CLASS
PROFILES = HIGHEST_GAIN - 2 * LOWEST_CLASS - LOWEST_PROFILE + 1
# Units per octave: of a row's exponent, of a gain and a profile, of the base step and of a ratio.
EXPONENT_UNITS, PROFILE_UNITS, BASE_UNITS, RATIO_UNITS = 8, 4, 64, 128
# A body's largest standard deviation lies between 2^-64 and 2^64; what is measured below counts as 2^-64.
LARGEST_EXPONENT = 64 * EXPONENT_UNITS
LEAST_STD = 2.0 ** -(LARGEST_EXPONENT // EXPONENT_UNITS)
# Bases that a body can have, with one to spare on either side.
LOWEST_BASE, HIGHEST_BASE = -(1 << 15) + 1, (1 << 15) - 2
# The prompt's mean of a row is sent in 32nds of its standard deviation.
MEAN_UNITS = 32
LARGEST_MEAN = 127
# Rows whose standard deviation lies more than this below the largest one are taken to have this.
LARGEST_DROP = 255
# Ratios of standard deviation to step, in `RATIO_UNITS`, above which one more bit is worth sending: −64 · log2 of
# how much of a Gaussian's distortion it takes away, as measured (docs/experiments/fixed-rate-codec.md). They are part
# of the layout.
WIDTH_THRESHOLDS = np.array([37, 132, 249, 368, 490, 615, 740, 867, 995, 1122, 1250, 1378, 1506], np.int64)
WIDEST = len(WIDTH_THRESHOLDS)
# 2^((k + 1/2) / 8) − 1 in units of a float32's last mantissa bit, rounded up.
EIGHTH_BORDERS = np.array([371396, 1164244, 2028851, 2971711, 3999908, 5121165, 6343903, 7677310], np.int32)
_MANTISSA_BITS, _EXPONENT_BIAS = 23, 127


def exponents_of(stds: np.ndarray) -> np.ndarray:
    """Round binary logarithms to eighths of an octave, from the bits of floats, alike on every machine.

    Args:
        stds: float32 of any shape, positive and finite.

    Returns:
        int64, of the same shape.
    """
    bits = stds.view(np.int32)
    octaves = (bits >> _MANTISSA_BITS).astype(np.int64) - _EXPONENT_BIAS
    eighths = np.searchsorted(EIGHTH_BORDERS, bits & ((1 << _MANTISSA_BITS) - 1), side="right")
    exponents: np.ndarray = EXPONENT_UNITS * octaves + eighths
    return exponents


def ratios(group_exponents: np.ndarray, base: int) -> np.ndarray:
    """Compare the standard deviation of each group of rows with the step of tokens of each profile.

    Args:
        group_exponents: int64 `[groups]`; see `RowScales.group_exponents`.
        base: binary logarithm of the step of class 0, in `BASE_UNITS`.

    Returns:
        int64 `[2 · PROFILES, groups]`, binary logarithms of standard deviation times gain ÷ step, in `RATIO_UNITS`:
        by profile, from `LOWEST_PROFILE` up, for tokens before a segment's turn, then for those after it, whose base
        is one more.
    """
    profiles = (RATIO_UNITS // PROFILE_UNITS) * (LOWEST_PROFILE + np.arange(PROFILES))
    steps = (RATIO_UNITS // BASE_UNITS) * np.array([base, base + 1])
    found: np.ndarray = group_exponents + (profiles - steps[:, None]).reshape(-1, 1)
    return found


@dataclass(frozen=True, eq=False)
class RowScales:
    """Standard deviation and mean of each row of a segment.

    Attributes:
        top: exponent of the largest standard deviation, in eighths of an octave.
        drops: uint8 `[rows]`, by how much each row's exponent lies below `top`.
        means: int8 `[rows]`, each row's mean in 32nds of its standard deviation.
    """

    top: int
    drops: np.ndarray
    means: np.ndarray

    @classmethod
    def of(cls, exponents: np.ndarray, means: np.ndarray) -> "RowScales":
        """Make scales of exponents.

        Args:
            exponents: int64 `[rows]`, in eighths of an octave.
            means: int8 `[rows]`.

        Returns:
            The scales.
        """
        top = int(exponents.max())
        return cls(top, np.minimum(top - exponents, LARGEST_DROP).astype(np.uint8), means)

    @cached_property
    def order(self) -> np.ndarray:
        """Sort the rows by falling standard deviation, equal ones by number: int64 `[rows]`."""
        return np.argsort(self.drops, kind="stable")

    @cached_property
    def group_exponents(self) -> np.ndarray:
        """Average the exponents of each group of `GROUP_ROWS` rows in `order`, in `RATIO_UNITS`, rounded down.

        Returns:
            int64 `[groups]`; the last group has what rows are left.
        """
        starts = np.arange(0, len(self.drops), GROUP_ROWS)
        drops = np.add.reduceat(self.drops[self.order].astype(np.int64), starts)
        rows = np.minimum(GROUP_ROWS, len(self.drops) - starts)
        found: np.ndarray = (RATIO_UNITS // EXPONENT_UNITS) * (rows * self.top - drops) // rows
        return found

    @cached_property
    def std(self) -> np.ndarray:
        """Return each row's standard deviation: float32 `[rows]`."""
        return np.exp2((self.top - self.drops.astype(np.int64)) / EXPONENT_UNITS).astype(np.float32)

    @cached_property
    def inverse_std(self) -> np.ndarray:
        """Return 1 ÷ each row's standard deviation: float32 `[rows]`."""
        return np.exp2((self.drops.astype(np.int64) - self.top) / EXPONENT_UNITS).astype(np.float32)

    @cached_property
    def mean(self) -> np.ndarray:
        """Return each row's mean: float32 `[rows]`."""
        found: np.ndarray = self.means.astype(np.float32) / np.float32(MEAN_UNITS) * self.std
        return found


def token_bytes(classes: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Join step classes and gains.

    Args:
        classes: int64 `[n]`, from `LOWEST_CLASS` to `HIGHEST_CLASS`.
        gains: int64 `[n]`, from `LOWEST_GAIN` to `HIGHEST_GAIN`.

    Returns:
        uint8 `[n]`: the class in the lower four bits, the gain in the upper ones, both counted from 0.
    """
    joined: np.ndarray = ((gains - LOWEST_GAIN) << 4 | (classes - LOWEST_CLASS)).astype(np.uint8)
    return joined


def profile_of_byte() -> np.ndarray:
    """Return the profile, counted from 0, that each token byte has: int64 `[256]`."""
    byte = np.arange(256)
    return (LOWEST_GAIN + (byte >> 4)) - 2 * (LOWEST_CLASS + (byte & 15)) - LOWEST_PROFILE


def gain_of_byte(sign: int) -> np.ndarray:
    """Return the gain of each token byte as a factor (`sign` 1), or its inverse (−1): float32 `[256]`."""
    gains: np.ndarray = np.exp2(sign * (LOWEST_GAIN + (np.arange(256) >> 4)) / PROFILE_UNITS).astype(np.float32)
    return gains


PROFILE_OF_BYTE = profile_of_byte()


@dataclass(frozen=True, eq=False)
class RecordLayout:
    """Where every token's record lies, and how wide each of its groups is.

    Attributes:
        ratios: int64 `[2 · PROFILES, groups]`; see `ratios`.
        profiles: int64 `[n]`, the row of `ratios` that each token has.
    """

    ratios: np.ndarray
    profiles: np.ndarray

    @classmethod
    def of(cls, scales: RowScales, tokens: np.ndarray, base: int, turn: int) -> "RecordLayout":
        """Lay out the records of a segment.

        Args:
            scales: of the rows.
            tokens: uint8 `[n]`; see `token_bytes`.
            base: of the segment's tokens before `turn`; that of the others is one more.
            turn: index of a token; n or more where all have the same base.

        Returns:
            The layout.
        """
        profiles = PROFILE_OF_BYTE[tokens]
        profiles[turn:] += PROFILES
        return cls(ratios(scales.group_exponents, base), profiles)

    @cached_property
    def widths(self) -> np.ndarray:
        """Return the bits of a coefficient by profile and group: uint8 `[2 · PROFILES, groups]`, up to `WIDEST`."""
        widths: np.ndarray = np.searchsorted(WIDTH_THRESHOLDS, self.ratios).astype(np.uint8)
        return widths

    @cached_property
    def words_of_profile(self) -> np.ndarray:
        """Count the 32-bit words of a record of each profile: int64 `[2 · PROFILES]`."""
        words: np.ndarray = self.widths.sum(axis=1, dtype=np.int64)
        return words

    @cached_property
    def starts(self) -> np.ndarray:
        """Return the word at which each token's record starts, and the number of words: int64 `[n + 1]`."""
        starts = np.zeros(len(self.profiles) + 1, np.int64)
        np.cumsum(self.words_of_profile[self.profiles], out=starts[1:])
        return starts

    @property
    def words(self) -> int:
        """Count the words of all records."""
        return int(self.starts[-1])
