"""The quantizer of each width: cells by integers, levels from a table.

A coefficient in units of its standard deviation and its token's gain is nearly Gaussian. The quantizer of w bits
divides the normal distribution of a certain standard deviation into 2^(w + 1) equal shares, its cells: twice as many
as w bits can tell apart, since a trellis says which half of them is at hand (`trellis`). Were each coefficient on its
own, √3 would be the best standard deviation at many bits: then cells are as dense as the cube root of the Gaussian
density (Panter & Dite 1951, "Quantization distortion in pulse-count modulation with nonuniform spacing of levels").
In a path coefficients in narrow cells give way to those in wide ones, and smaller standard deviations are better.

The distribution's integral is taken to be linear on each of `PIECES` pieces, in integers. So a coefficient's cell
does not depend on what computes it.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from statistics import NormalDist

import numpy as np
import torch

from spectrumkv.kernels.fixed_rate.layout import RATIO_UNITS, WIDEST, WIDTH_THRESHOLDS, RecordLayout

# Standard deviations of the divided distributions by width, from 1 bit to `WIDEST`.
COMPANDER_STDS = (0.95, 1.28, 1.42, 1.50, 1.55, 1.58, *(1.60,) * (WIDEST - 6))
# Magnitudes are integers in units of 2^-FRACTION_BITS, up to PIECES pieces of 2^PIECE_BITS units.
FRACTION_BITS, PIECE_BITS, PIECES = 16, 14, 32
KNOTS_PER_UNIT = 1 << (FRACTION_BITS - PIECE_BITS)
LARGEST_MAGNITUDE = np.float32((PIECES << PIECE_BITS) - 1) / np.float32(1 << FRACTION_BITS)
# Bits of a position among the cells of one sign, whatever their number.
POSITION_BITS = 29
# States of the trellis, and what is larger than the cost of any path, of which there is one only at first.
STATES, UNREACHED = 4, np.float32(1e30)
# A coefficient escapes where the square of its distance from the nearest of all levels could exceed this times its
# token's slope. The path may choose a level that is farther away, up to four times; limits that kept to that would
# cost more in escapes than they save in errors (docs/experiments/fixed-rate-codec.md).
ESCAPE_SLOPES = 96.0
# Between these ratios of standard deviation to step limits of escapes are tabulated: below the first one nothing
# escapes, and above the last one there are no more bits.
LOWEST_RATIO, HIGHEST_RATIO = -32 * RATIO_UNITS, int(WIDTH_THRESHOLDS[-1]) + RATIO_UNITS


@dataclass(frozen=True, eq=False)
class Quantizers:
    """The quantizers of all widths.

    Attributes:
        offset: int32 `[WIDEST + 1, PIECES]`, position at which a piece starts.
        slope: int32 `[WIDEST + 1, PIECES]`, positions per unit of magnitude.
        level: float32 `[2^(WIDEST + 2)]`, what cells stand for. Cell u of w bits, from −2^w to 2^w − 1, has entry
            2^(w + 1) + u where u is 0 or more, and 2^(w + 2) + u below. The first four entries are 0.
        limit: float32 `[HIGHEST_RATIO − LOWEST_RATIO + 1]`, by ratio: the magnitude beyond which coefficients escape.
    """

    offset: np.ndarray
    slope: np.ndarray
    level: np.ndarray
    limit: np.ndarray


@lru_cache(maxsize=1)
def quantizers() -> Quantizers:
    """Return the quantizers of all widths."""
    offset, slope = np.zeros((2, WIDEST + 1, PIECES), np.int32)
    level = np.zeros(1 << (WIDEST + 2))
    ratio = np.arange(LOWEST_RATIO, HIGHEST_RATIO + 1)
    width_of = np.searchsorted(WIDTH_THRESHOLDS, ratio)
    error = sqrt(ESCAPE_SLOPES) * np.exp2(-ratio / RATIO_UNITS)
    limit = error.copy()
    for width in range(1, WIDEST + 1):
        normal = NormalDist(0.0, COMPANDER_STDS[width - 1])
        shares = np.array([2 * normal.cdf(knot / KNOTS_PER_UNIT) - 1 for knot in range(PIECES + 1)])
        positions = np.floor(shares * ((1 << POSITION_BITS) - 1)).astype(np.int64)
        offset[width] = positions[:-1]
        slope[width] = np.diff(positions) >> PIECE_BITS
        borders = _borders(positions, 1 << width)
        magnitudes = _centroids(borders)
        level[2 << width : 4 << width] = np.append(magnitudes, -magnitudes[::-1])
        own = width_of == width
        limit[own] = _limits(borders, magnitudes, error[own])
    return Quantizers(offset, slope, level.astype(np.float32), limit.astype(np.float32))


def _borders(positions: np.ndarray, cells: int) -> np.ndarray:
    """Return the lower border of each cell of one sign: float64 `[cells]`."""
    knots = np.arange(PIECES + 1) / KNOTS_PER_UNIT
    borders: np.ndarray = np.interp(np.arange(cells) * ((1 << POSITION_BITS) / cells), positions, knots)
    return borders


def _centroids(borders: np.ndarray) -> np.ndarray:
    """Return the mean magnitude of a standard normal variable in each cell: float64 `[cells]`."""
    # Beyond the border, since differences of small numbers keep their digits.
    beyond = torch.special.ndtr(torch.from_numpy(-borders)).numpy()
    density = np.exp(-(borders**2) / 2) / sqrt(2 * np.pi)
    mass, moment = -np.diff(beyond, append=0.0), -np.diff(density, append=0.0)
    centroids: np.ndarray = moment / mass
    return centroids


def _limits(borders: np.ndarray, level: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return the magnitude up to which each of several errors is not exceeded: float64, of `error`'s shape.

    Cells are the wider the farther out they are: it is the border of the first one that is too wide, or lies beyond
    the outermost level.
    """
    inwards, outwards = level - borders, np.append(borders[1:] - level[:-1], 0.0)
    too_wide = np.searchsorted(np.maximum.accumulate(np.maximum(inwards, outwards)), error)
    limits: np.ndarray = np.append(borders, 0.0)[too_wide]
    return np.where(too_wide == len(borders), level[-1] + error, limits)


def escape_limits(layout: RecordLayout) -> np.ndarray:
    """Return the magnitudes beyond which coefficients escape.

    Args:
        layout: of the records.

    Returns:
        float32 `[2 · PROFILES, groups]`, in units of a row's standard deviation and a token's gain.
    """
    limits: np.ndarray = quantizers().limit[np.clip(layout.ratios, LOWEST_RATIO, HIGHEST_RATIO) - LOWEST_RATIO]
    return limits
