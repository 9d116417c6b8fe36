"""What a token is reported under: the tier whose width is nearest to its bits, and its share of a body's bytes."""

from collections.abc import Mapping

import numpy as np
import torch

from spectrumkv.common.kv.codecs.spectral.layout import CLASSES_PER_OCTAVE, LOWEST_CLASS, STEP_CLASSES
from spectrumkv.common.kv.codecs.spectral.steps import TokenClasses
from spectrumkv.common.kv.codecs.spectral.transform import LayerTransform
from spectrumkv.common.kv.tiers import Tier

# Mean bits an element up to which a token counts as INT4, and as INT8.
INT4_BITS, INT8_BITS = 6.0, 12.0
_TIERS = np.array([Tier.INT4, Tier.INT8, Tier.FP16], np.uint8)
SINK_BITS = 16.0
# Taken for the bits of steps so coarse that nothing is sent, so that shares can be told.
LEAST_BITS = 1e-3


def class_bits(transform: LayerTransform, base: float) -> np.ndarray:
    """Expected bits an element of tokens of each step class, from `LOWEST_CLASS` up: float64 `[classes]`.

    Args:
        transform: of the layer.
        base: binary logarithm of the step of class 0.
    """
    bits: np.ndarray = np.maximum(transform.mean_bits(base + STEP_CLASSES / CLASSES_PER_OCTAVE), LEAST_BITS)
    return bits


def token_tiers(bits: np.ndarray, tokens: TokenClasses) -> torch.Tensor:
    """The tier whose width is nearest to each token's bits: uint8 `[n]`. `bits` are those of `class_bits`."""
    of_class = _TIERS[np.searchsorted((INT4_BITS, INT8_BITS), bits)]
    tiers = of_class[tokens.classes - LOWEST_CLASS]
    tiers[: tokens.sinks] = Tier.FP16
    return torch.from_numpy(tiers)


def tier_bytes(bits: np.ndarray, tokens: TokenClasses, tiers: torch.Tensor, body_bytes: int) -> Mapping[Tier, int]:
    """How a body's bytes divide among the tiers: by expected bits, which is as well as one entropy coder tells."""
    of_tokens = bits[tokens.classes - LOWEST_CLASS]
    of_tokens[: tokens.sinks] = SINK_BITS
    weights = np.bincount(tiers.numpy(), of_tokens, minlength=len(Tier)).tolist()
    total = sum(weights)
    shares = {tier: int(body_bytes * weights[tier] / total) for tier in (Tier.INT4, Tier.INT8, Tier.FP16)}
    widest = max(shares, key=lambda tier: shares[tier])
    shares[widest] += body_bytes - sum(shares.values())
    return shares
