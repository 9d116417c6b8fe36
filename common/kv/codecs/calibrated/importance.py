"""How fine each token is coded relative to the others of its layer, and which tier it is reported under.

Both are what the spectral bit allocation rests on, whether coefficients are sent or whole tiers.
"""

import numpy as np
import torch

from spectrumkv.common.errors import NotFiniteError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.scoring import SINK_TOKENS, mean_attention, scorers
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.kernels.attention_scores import LEAST_SHARE
from spectrumkv.kernels.step_classes import CLASSES_PER_OCTAVE, COARSEST_CLASS, LOWEST_CLASS

# A step goes with this power of a token's sensitivity. At high resolution the distortion of a step Δ is Δ²/12 times
# the sensitivity (Gray & Neuhoff 1998, "Quantization"); where its slope against the rate is alike for all tokens, as
# it is for the least distortion at a rate, Δ² times the sensitivity is alike: the power −1/2. Sensitivities are only
# predicted, though, and a prediction is trusted a little less.
SENSITIVITY_POWER = 0.425
# Mean bits an element up to which a token counts as INT4, and as INT8.
INT4_BITS, INT8_BITS = 6.0, 12.0
_TIERS = np.array([Tier.INT4, Tier.INT8, Tier.FP16], np.uint8)


def affordable_sinks(segment_bytes: int, geometry: KvGeometry) -> int:
    """Return how many first tokens are sent in the 16-bit dtype: they may take a quarter of the budget.

    Args:
        segment_bytes: what all segments may take.
        geometry: shape and dtype of the model's cache.
    """
    return min(SINK_TOKENS, max(0, segment_bytes // (4 * geometry.fp16_bytes(1))))


def attention_shares(capture: LayerCapture, scorer: str, seed: int) -> torch.Tensor:
    """Return the share of the attention that each token's step follows.

    Sensitivities were calibrated by mean attention. A scorer that measures something else decides who gets the
    largest share, the next largest, and so on.

    Args:
        capture: the layer.
        scorer: name of the scorer.
        seed: for scorers that draw.

    Returns:
        float32 `[n]` on the device of the keys; infinite or NaN where keys or queries are.
    """
    shares = mean_attention(capture)
    if scorer == "attention":
        return shares
    ranking = scorers.get(scorer)(capture, seed).argsort(descending=True, stable=True)
    return torch.empty_like(shares).scatter_(0, ranking, shares.sort(descending=True).values)


def step_octaves(capture: LayerCapture, basis: CalibratedBasis, scorer: str, seed: int, sinks: int) -> np.ndarray:
    """Return the binary logarithm of each token's step, finer by its share of the attention.

    Args:
        capture: the layer.
        basis: of the model.
        scorer: see `attention_shares`.
        seed: see there.
        sinks: how many of the first tokens do not count; the mean of the others is 0.

    Returns:
        float64 `[n]`, up to a number common to all.

    Raises:
        NotFiniteError: keys or queries are infinite or NaN.
    """
    shares = attention_shares(capture, scorer, seed).cpu().numpy()
    if not np.isfinite(shares).all():
        raise NotFiniteError(f"keys or queries of layer {capture.layer} are infinite or NaN")
    attention = np.log2(np.maximum(shares, LEAST_SHARE), dtype=np.float64)
    exponent = -SENSITIVITY_POWER * float(basis.attention_exponent[capture.layer])
    others = attention[sinks:]
    octaves: np.ndarray = exponent * (attention - (others.mean() if len(others) else 0.0))
    return octaves


def step_classes(capture: LayerCapture, basis: CalibratedBasis, scorer: str, seed: int, sinks: int) -> np.ndarray:
    """Return the step class of each token: `step_octaves`, rounded.

    Args:
        capture: see `step_octaves`, as for the others.
        basis: see there.
        scorer: see there.
        seed: see there.
        sinks: see there.

    Returns:
        int64 `[n]`, from `LOWEST_CLASS` to `COARSEST_CLASS`.
    """
    octaves = step_octaves(capture, basis, scorer, seed, sinks)
    classes: np.ndarray = np.clip(np.rint(CLASSES_PER_OCTAVE * octaves), LOWEST_CLASS, COARSEST_CLASS)
    return classes.astype(np.int64)


def nearest_tiers(bits: np.ndarray) -> np.ndarray:
    """Name the tier whose width is nearest to some bits an element.

    Args:
        bits: float64 `[n]`.

    Returns:
        uint8 `[n]`, `Tier` values.
    """
    nearest: np.ndarray = _TIERS[np.searchsorted((INT4_BITS, INT8_BITS), bits)]
    return nearest
