"""The quantizer of each width: cells by integers, levels from a table.

A coefficient in units of its standard deviation and its token's gain is nearly Gaussian. A quantizer of w bits
divides the normal distribution of a certain standard deviation into 2^w equal shares. At many bits √3 is the best
one: then cells are as dense as the cube root of the Gaussian density (Panter & Dite 1951, "Quantization distortion in
pulse-count modulation with nonuniform spacing of levels"). At few bits a smaller one comes within 0.6 % of the least
distortion (Lloyd 1982, "Least squares quantization in PCM").

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
COMPANDER_STDS = (1.0, 1.455, 1.55, 1.60, 1.64, 1.68, 1.70, 1.72, *(sqrt(3.0),) * (WIDEST - 8))
# Magnitudes are integers in units of 2^-FRACTION_BITS, up to PIECES pieces of 2^PIECE_BITS units.
FRACTION_BITS, PIECE_BITS, PIECES = 16, 14, 32
KNOTS_PER_UNIT = 1 << (FRACTION_BITS - PIECE_BITS)
LARGEST_MAGNITUDE = np.float32((PIECES << PIECE_BITS) - 1) / np.float32(1 << FRACTION_BITS)
# Bits of a position among the cells of one sign, whatever their number.
POSITION_BITS = 29
# A coefficient escapes where its squared error could exceed this times its token's slope: about what its own 64 bits
# take away elsewhere.
ESCAPE_SLOPES = 48.0
# Between these ratios of standard deviation to step limits of escapes are tabulated: below the first one nothing
# escapes, and above the last one there are no more bits.
LOWEST_RATIO, HIGHEST_RATIO = -32 * RATIO_UNITS, int(WIDTH_THRESHOLDS[-1]) + RATIO_UNITS


@dataclass(frozen=True, eq=False)
class Quantizers:
    """The quantizers of all widths.

    Attributes:
        offset: int32 `[WIDEST + 1, PIECES]`, position at which a piece starts.
        slope: int32 `[WIDEST + 1, PIECES]`, positions per unit of magnitude.
        level: float32 `[2^WIDEST]`, magnitudes that cells stand for: cell k of w bits has entry 2^(w − 1) + k. Entry
            0 is 0.
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
    level = np.zeros(1 << WIDEST)
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
        cells = 1 << (width - 1)
        borders = _borders(positions, cells)
        level[cells : 2 * cells] = _centroids(borders)
        own = width_of == width
        limit[own] = _limits(borders, level[cells : 2 * cells], error[own])
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
