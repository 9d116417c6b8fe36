"""How fine each token is coded relative to the others of its layer, and which tier it is reported under.

Both are what the spectral bit allocation rests on, whether the spectral codec writes it or a codec of whole tiers.
"""

from collections.abc import Mapping

import numpy as np
import torch

from spectrumkv.common.errors import NotFiniteError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.kv.codecs.spectral.coefficients import CoefficientModel
from spectrumkv.common.kv.codecs.spectral.layout import CLASSES_PER_OCTAVE, LOWEST_CLASS, STEP_CLASSES, TokenClasses
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.scoring import SINK_TOKENS, mean_attention, scorers
from spectrumkv.common.kv.tiers import Tier

# A step goes with this power of a token's sensitivity. At high resolution the distortion of a step Δ is Δ²/12 times
# the sensitivity (Gray & Neuhoff 1998, "Quantization"); where its slope against the rate is alike for all tokens, as
# it is for the least distortion at a rate, Δ² times the sensitivity is alike.
SENSITIVITY_POWER = 0.5
# Shares of the attention below this one are all alike.
LEAST_SHARE = 1e-7
# Mean bits an element up to which a token counts as INT4, and as INT8.
INT4_BITS, INT8_BITS = 6.0, 12.0
_TIERS = np.array([Tier.INT4, Tier.INT8, Tier.FP16], np.uint8)
SINK_BITS = 16.0
# Taken for the bits of steps so coarse that nothing is sent, so that shares can be told.
LEAST_BITS = 1e-3


def affordable_sinks(segment_bytes: int, geometry: KvGeometry) -> int:
    """Return how many first tokens are sent in the 16-bit dtype: they may take a quarter of the budget.

    Args:
        segment_bytes: what all segments may take.
        geometry: shape and dtype of the model's cache.
    """
    return min(SINK_TOKENS, max(0, segment_bytes // (4 * geometry.fp16_bytes(1))))


def step_octaves(capture: LayerCapture, basis: SpectralBasis, scorer: str, seed: int, sinks: int) -> np.ndarray:
    """Return the binary logarithm of each token's step, finer by its share of the attention.

    Sensitivities were calibrated by mean attention. A scorer that measures something else decides who gets the
    largest share, the next largest, and so on.

    Args:
        capture: the layer.
        basis: of the model.
        scorer: name of the scorer.
        seed: for scorers that draw.
        sinks: how many of the first tokens do not count; the mean of the others is 0.

    Returns:
        float64 `[n]`, up to a number common to all.

    Raises:
        NotFiniteError: keys or queries are infinite or NaN.
    """
    shares = mean_attention(capture).cpu().numpy()
    if not np.isfinite(shares).all():
        raise NotFiniteError(f"keys or queries of layer {capture.layer} are infinite or NaN")
    if scorer != "attention":
        ranking = scorers.get(scorer)(capture, seed).argsort(descending=True, stable=True).cpu().numpy()
        shares[ranking] = np.sort(shares)[::-1]
    attention = np.log2(np.maximum(shares, LEAST_SHARE), dtype=np.float64)
    exponent = -SENSITIVITY_POWER * float(basis.attention_exponent[capture.layer])
    others = attention[sinks:]
    octaves: np.ndarray = exponent * (attention - (others.mean() if len(others) else 0.0))
    return octaves


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
    of_class = _TIERS[np.searchsorted((INT4_BITS, INT8_BITS), bits)]
    tiers = of_class[tokens.classes - LOWEST_CLASS]
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
