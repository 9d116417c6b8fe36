"""What the coefficients of a segment are like: the gain of each token, and each row's standard deviation and mean.

A token's coefficients are taken for Gaussian, with the rows' standard deviations times the token's gain: a scale
mixture (Andrews & Mallows 1974, "Scale mixtures of normal distributions"). Gains are found against the calibrated
standard deviations, and the rows' means and standard deviations with tokens weighted by them, in one pass each.
"""

from dataclasses import dataclass

import numpy as np
import torch

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.kernels.fixed_rate.dispatch import moments
from spectrumkv.kernels.fixed_rate.layout import (
    EXPONENT_UNITS,
    HIGHEST_GAIN,
    LARGEST_EXPONENT,
    LARGEST_MEAN,
    LEAST_STD,
    LOWEST_GAIN,
    MEAN_UNITS,
    PROFILE_UNITS,
    RowScales,
    exponents_of,
)


@dataclass(frozen=True, eq=False)
class SegmentStatistics:
    """What the coefficients of a segment are like.

    Attributes:
        scales: of the rows.
        gains: int64 `[n]`, of the tokens, in quarter octaves.
    """

    scales: RowScales
    gains: np.ndarray


def measure(coefficients: torch.Tensor, energy: torch.Tensor, std: np.ndarray, own: bool) -> SegmentStatistics:
    """Find what the coefficients of a segment are like.

    Args:
        coefficients: float32 `[n, rows]`, n ≥ 1.
        energy: float32 `[n]`, finite: each token's sum of scaled squares; see `gains.gain_scales`.
        std: float32 `[rows]`, calibrated standard deviations.
        own: whether the segment is to have scales of its own; else it has the calibrated ones, moved as a whole.

    Returns:
        The statistics.

    Raises:
        InvalidArgumentError: a row's standard deviation is too large for the codec.
    """
    octaves = np.log2(np.maximum(energy.numpy() / len(std), np.float32(LEAST_STD))) / 2
    level = float(octaves.mean())
    gains = np.clip(np.rint(PROFILE_UNITS * (octaves - level)), LOWEST_GAIN, HIGHEST_GAIN).astype(np.int64)
    scales = _own_scales(coefficients, gains) if own else calibrated_scales(std, round(EXPONENT_UNITS * level))
    check_stds(scales)
    return SegmentStatistics(scales, gains)


def calibrated_scales(std: np.ndarray, shift: int) -> RowScales:
    """Return the calibrated standard deviations, all moved by so many eighths of an octave, with means of 0.

    Args:
        std: float32 `[rows]`.
        shift: in eighths of an octave.
    """
    return RowScales.of(exponents_of(std) + shift, np.zeros(len(std), np.int8))


def _own_scales(coefficients: torch.Tensor, gains: np.ndarray) -> RowScales:
    """Return the segment's own standard deviations and means.

    Raises:
        InvalidArgumentError: they are too large for float32.
    """
    weights = np.exp2(-2 * gains / PROFILE_UNITS).astype(np.float32)
    sums, squares = (one.numpy() for one in moments(coefficients, torch.from_numpy(weights)))
    mean = sums / weights.sum(dtype=np.float64)
    variance = np.maximum(squares - mean * sums, 0) / len(gains)
    # A mean is sent in units of the standard deviation, which must not be too small for it.
    std = np.maximum(np.sqrt(variance), np.abs(mean) * (MEAN_UNITS / LARGEST_MEAN))
    if not np.isfinite(std).all():
        raise InvalidArgumentError("coefficients are too large: their squares exceed float32")
    scales = RowScales.of(
        exponents_of(np.maximum(std, np.float32(LEAST_STD)).astype(np.float32)), np.zeros(len(mean), np.int8)
    )
    means = np.clip(np.rint(mean / scales.std * MEAN_UNITS), -LARGEST_MEAN, LARGEST_MEAN)
    return RowScales(scales.top, scales.drops, means.astype(np.int8))


def check_stds(scales: RowScales) -> None:
    """Refuse standard deviations beyond what bodies may have.

    Args:
        scales: of a segment.

    Raises:
        InvalidArgumentError: one is.
    """
    if abs(scales.top) > LARGEST_EXPONENT:
        raise InvalidArgumentError(
            f"a coefficient's standard deviation is 2^{scales.top / EXPONENT_UNITS:g}; codec fixed_rate has those up "
            f"to 2^{LARGEST_EXPONENT // EXPONENT_UNITS}"
        )
