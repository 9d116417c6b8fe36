"""What the coefficients of a block are like: the gain of each token, and each row's spread and mean.

A token's coefficients are taken for Gaussian, with the rows' spreads times the token's gain: a scale mixture
(Andrews & Mallows 1974, "Scale mixtures of normal distributions"). Gains are found against the calibrated spreads,
and the rows' means and spreads with tokens weighted by them, in one pass each.
"""

from dataclasses import dataclass

import numpy as np
import torch

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.kernels.fixed_rate.dispatch import moments
from spectrumkv.kernels.fixed_rate.layout import (
    EXPONENT_UNITS,
    HIGHEST_GAIN,
    LARGEST_MEAN,
    LOWEST_GAIN,
    MEAN_UNITS,
    RowScales,
    exponents_of,
)

# Gains have quarter octaves.
GAIN_UNITS = 4
# Spreads are powers of two of at most this magnitude.
LARGEST_EXPONENT = 64 * EXPONENT_UNITS
_LEAST = np.float32(2.0 ** -(LARGEST_EXPONENT // EXPONENT_UNITS))


@dataclass(frozen=True, eq=False)
class BlockStatistics:
    """What the coefficients of a block are like.

    Attributes:
        scales: of the rows.
        gains: int64 `[n]`, of the tokens, in quarter octaves.
    """

    scales: RowScales
    gains: np.ndarray


def measure(coefficients: torch.Tensor, energy: torch.Tensor, std: np.ndarray, own: bool) -> BlockStatistics:
    """Find what the coefficients of a block are like.

    Args:
        coefficients: float32 `[n, rows]`, n ≥ 1.
        energy: float32 `[n]`, finite: each token's sum of squares in units of the calibrated spreads.
        std: float32 `[rows]`, calibrated spreads.
        own: whether the block is to have scales of its own; else it has the calibrated ones, moved as a whole.

    Returns:
        The statistics.

    Raises:
        InvalidArgumentError: a row's spread is too large for the codec.
    """
    octaves = np.log2(np.maximum(energy.numpy() / len(std), _LEAST)) / 2
    level = float(octaves.mean())
    gains = np.clip(np.rint(GAIN_UNITS * (octaves - level)), LOWEST_GAIN, HIGHEST_GAIN).astype(np.int64)
    scales = _own_scales(coefficients, gains) if own else calibrated_scales(std, round(EXPONENT_UNITS * level))
    check_spreads(scales)
    return BlockStatistics(scales, gains)


def calibrated_scales(std: np.ndarray, shift: int) -> RowScales:
    """Return the calibrated spreads, all moved by so many eighths of an octave, with means of 0.

    Args:
        std: float32 `[rows]`.
        shift: in eighths of an octave.
    """
    return RowScales.of(exponents_of(std) + shift, np.zeros(len(std), np.int8))


def _own_scales(coefficients: torch.Tensor, gains: np.ndarray) -> RowScales:
    """Return the block's own spreads and means.

    Raises:
        InvalidArgumentError: they are too large for float32.
    """
    weights = np.exp2(-2 * gains / GAIN_UNITS).astype(np.float32)
    sums, squares = (one.numpy() for one in moments(coefficients, torch.from_numpy(weights)))
    mean = sums / weights.sum(dtype=np.float64)
    variance = np.maximum(squares - mean * sums, 0) / len(gains)
    # A mean is sent in units of the spread, which must not be too small for it.
    spread = np.maximum(np.sqrt(variance), np.abs(mean) * (MEAN_UNITS / LARGEST_MEAN))
    if not np.isfinite(spread).all():
        raise InvalidArgumentError("coefficients are too large: their squares exceed float32")
    scales = RowScales.of(exponents_of(np.maximum(spread, _LEAST).astype(np.float32)), np.zeros(len(mean), np.int8))
    means = np.clip(np.rint(mean / scales.spread * MEAN_UNITS), -LARGEST_MEAN, LARGEST_MEAN)
    return RowScales(scales.top, scales.drops, means.astype(np.int8))


def check_spreads(scales: RowScales) -> None:
    """Refuse spreads beyond what bodies may have.

    Args:
        scales: of a block.

    Raises:
        InvalidArgumentError: one is.
    """
    if abs(scales.top) > LARGEST_EXPONENT:
        raise InvalidArgumentError(
            f"a coefficient's spread is 2^{scales.top / EXPONENT_UNITS:g}; codec fixed_rate has those up to "
            f"2^{LARGEST_EXPONENT // EXPONENT_UNITS}"
        )
