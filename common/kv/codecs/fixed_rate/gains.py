"""Which coefficients tell a token's gain: those that records of the budget have bits for.

A gain says by how much a token's coefficients exceed what rows usually have. At small budgets most rows get no bits,
and however large their coefficients are, they are not sent. They would only blur the gain of the rows that are.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.codecs.fixed_rate.rate import finest_base
from spectrumkv.common.kv.codecs.fixed_rate.segment_codec import WORD_BYTES
from spectrumkv.common.kv.codecs.fixed_rate.transform import LayerTransform
from spectrumkv.kernels.fixed_rate.layout import (
    BASE_UNITS,
    GROUP_ROWS,
    LOWEST_PROFILE,
    WIDTH_THRESHOLDS,
    RowScales,
    ratios,
)

# Levels are whole quarters of an octave, so that budgets share them.
LEVELS_PER_OCTAVE = 4
LEVEL = BASE_UNITS // LEVELS_PER_OCTAVE


def gain_level(transforms: Sequence[LayerTransform], token_bytes: float) -> int:
    """Return how fine the steps of a mean token would be if prompts were as the calibrated ones.

    Args:
        transforms: of all layers.
        token_bytes: that a token of one layer may take.

    Returns:
        The binary logarithm of the steps, in quarters of an octave.
    """
    exponents = np.concatenate([one.calibrated.group_exponents for one in transforms])
    words = int(token_bytes * len(transforms)) // WORD_BYTES
    return round(finest_base(words, exponents, np.ones_like(exponents)) / LEVEL)


@lru_cache(maxsize=32)
def gain_scales(basis: CalibratedBasis, level: int) -> torch.Tensor:
    """Return what coefficients are multiplied with in the sum of squares that tells a token's gain.

    Args:
        basis: of the model.
        level: see `gain_level`.

    Returns:
        float32 `[layers, rows]`: 0 for rows without bits; for the others 1 ÷ their calibrated standard deviation, and
        the same factor for all of them, so that a mean token's sum is the number of rows.
    """
    return torch.stack([_scale(one, level * LEVEL) for one in LayerTransform.of_layers(basis)])


def _scale(transform: LayerTransform, base: int) -> torch.Tensor:
    counted = torch.from_numpy(_rows_with_bits(transform.calibrated, base))
    return counted * (transform.rows / counted.sum()).sqrt() / torch.from_numpy(transform.std)


def _rows_with_bits(scales: RowScales, base: int) -> np.ndarray:
    """Return 1 for each row of a group that a mean token has bits for, and for those of the first group: float32."""
    # A mean token has gain 0 and class 0, and so profile 0.
    has_bits = ratios(scales.group_exponents, base)[-LOWEST_PROFILE] > WIDTH_THRESHOLDS[0]
    has_bits[0] = True
    rows = np.empty(len(scales.order), np.float32)
    rows[scales.order] = np.repeat(has_bits, GROUP_ROWS)[: len(rows)]
    return rows
