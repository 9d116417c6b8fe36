"""How fine each token is coded relative to the others of its layer: what the spectral allocation rests on."""

import numpy as np

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.scoring import SINK_TOKENS, LayerCapture, observed_attention, scorers

# A step goes with this power of a token's sensitivity: at equal slope of distortion against rate, errors times
# sensitivity are alike everywhere.
SENSITIVITY_POWER = 0.5
# Shares of the attention below this one are all alike.
LEAST_SHARE = 1e-7


def affordable_sinks(budget_bytes: int, geometry: KvGeometry) -> int:
    """How many first tokens are sent in the 16-bit dtype: they may take a quarter of the budget."""
    return min(SINK_TOKENS, max(0, budget_bytes // (4 * geometry.fp16_bytes(1))))


def step_octaves(capture: LayerCapture, basis: SpectralBasis, scorer: str, sinks: int) -> np.ndarray:
    """Binary logarithm of each token's step, up to a number common to all: finer by its share of the attention.

    Sensitivities were calibrated by observed attention. A scorer that measures something else decides who gets the
    largest share, the next largest, and so on.

    Args:
        capture: the layer.
        basis: of the model.
        scorer: name of the scorer.
        sinks: how many of the first tokens do not count; the mean of the others is 0.

    Returns:
        float64 `[n]`.

    Raises:
        InvalidArgumentError: keys or queries are infinite or NaN.
    """
    shares = observed_attention(capture).mean(dim=0).cpu().numpy()
    if not np.isfinite(shares).all():
        raise InvalidArgumentError(f"keys or queries of layer {capture.layer} are infinite or NaN")
    if scorer != "attention":
        ranking = scorers.get(scorer)(capture).argsort(descending=True, stable=True).cpu().numpy()
        shares[ranking] = np.sort(shares)[::-1]
    attention = np.log2(np.maximum(shares, LEAST_SHARE), dtype=np.float64)
    exponent = -SENSITIVITY_POWER * float(basis.attention_exponent[capture.layer])
    others = attention[sinks:]
    octaves: np.ndarray = exponent * (attention - (others.mean() if len(others) else 0.0))
    return octaves
