"""Which tier a token of codec spectral is reported under, and how many bytes each tier takes of a body."""

from collections.abc import Mapping

import numpy as np
import torch

from spectrumkv.common.kv.codecs.calibrated.importance import nearest_tiers
from spectrumkv.common.kv.codecs.spectral.coefficients import CoefficientModel
from spectrumkv.common.kv.codecs.spectral.layout import STEP_CLASSES, TokenClasses
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.kernels.step_classes import CLASSES_PER_OCTAVE, LOWEST_CLASS

SINK_BITS = 16.0
# Taken for the bits of steps so coarse that nothing is sent, so that shares can be told.
LEAST_BITS = 1e-3


def class_bits(model: CoefficientModel, base: float) -> np.ndarray:
    """Estimate the bits an element of tokens of each step class.

    Args:
        model: of the coefficients.
        base: binary logarithm of the step of class 0.

    Returns:
        float64 `[classes]`, from `LOWEST_CLASS` up.
    """
    bits: np.ndarray = np.maximum(model.mean_bits(base + STEP_CLASSES / CLASSES_PER_OCTAVE), LEAST_BITS)
    return bits


def token_tiers(bits: np.ndarray, tokens: TokenClasses) -> torch.Tensor:
    """Name the tier whose width is nearest to each token's bits.

    Args:
        bits: see `class_bits`.
        tokens: their classes; sinks are at FP16.

    Returns:
        uint8 `[n]` on the CPU, `Tier` values.
    """
    tiers = nearest_tiers(bits)[tokens.classes - LOWEST_CLASS]
    tiers[: tokens.sinks] = Tier.FP16
    return torch.from_numpy(tiers)


def tier_bytes(bits: np.ndarray, tokens: TokenClasses, tiers: torch.Tensor, body_bytes: int) -> Mapping[Tier, int]:
    """Divide a body's bytes among the tiers by expected bits, since the tiers share one entropy coder.

    Args:
        bits: see `class_bits`.
        tokens: their classes.
        tiers: uint8 `[n]` on the CPU, their tiers.
        body_bytes: to be divided.

    Returns:
        Bytes of INT4, INT8 and FP16, `body_bytes` together.
    """
    of_tokens = bits[tokens.classes - LOWEST_CLASS]
    of_tokens[: tokens.sinks] = SINK_BITS
    weights = np.bincount(tiers.numpy(), of_tokens, minlength=len(Tier)).tolist()
    total = sum(weights)
    shares = {tier: int(body_bytes * weights[tier] / total) for tier in (Tier.INT4, Tier.INT8, Tier.FP16)}
    widest = max(shares, key=lambda tier: shares[tier])
    shares[widest] += body_bytes - sum(shares.values())
    return shares


def token_bytes(bits: np.ndarray, tokens: TokenClasses, sink_bytes: int, body_bytes: int) -> np.ndarray:
    """Divide a body's bytes among its tokens.

    A sink has its own bytes. The other tokens share an entropy coder, and what is left by their expected bits.

    Args:
        bits: see `class_bits`.
        tokens: their classes.
        sink_bytes: of one sink.
        body_bytes: to be divided.

    Returns:
        float64 `[n]`, `body_bytes` together.
    """
    if not len(tokens.coded):
        return np.full(tokens.sinks, body_bytes / tokens.sinks)
    expected = bits[tokens.coded]
    left = body_bytes - tokens.sinks * sink_bytes
    return np.concatenate((np.full(tokens.sinks, float(sink_bytes)), expected * (left / expected.sum())))
