"""The spectral bit allocation in whole tiers: for links that are faster than the entropy coder.

A token is given the tier that is nearest to the bits that the spectral codec would spend on it, and a `TierCodec`
writes that. The budget is the same, and so is each token's share of it. The transform and the coder are given up,
which say more with the same bits.
"""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch

from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.codecs.calibrated.importance import INT4_BITS, INT8_BITS, step_octaves
from spectrumkv.common.kv.codecs.calibrated.request import CalibratedRequest
from spectrumkv.common.kv.codecs.spectral.transform import LayerTransform
from spectrumkv.common.kv.segment import SEGMENT_HEADER
from spectrumkv.common.kv.tiers import Tier, tier_map_bytes

# Base steps, relative to a layer's largest standard deviation, between which its tokens go from 16 bits to 4.
STEP_GRID = np.arange(-20, 12, 1 / 32)
# By how much the steps of the first and the last token differ where both get the same attention.
TIE_OCTAVES = 1e-3
# Octaves up to which a base step is sought.
RESOLUTION = 1e-7


class SpectralTiers:
    """A `TierAllocation` that gives the tokens of one prompt whole tiers, within a byte budget.

    Args:
        request: the prompt. A budget that is too small even for INT4 in all layers is exceeded.
        token_bytes: what a token of one layer takes of a body at INT4, INT8 and FP16.
    """

    def __init__(self, request: CalibratedRequest, token_bytes: Mapping[Tier, float]) -> None:
        self._request = request
        self._token_bytes = token_bytes
        self._left_bytes = request.segment_bytes
        self._layers_left = request.geometry.layers
        self._sinks = request.sinks if request.tokens > 1 else 0
        self._int8_from, self._int4_from = _thresholds(request.basis)

    def tiers(self, capture: LayerCapture) -> torch.Tensor:
        """Give the tokens of the next layer tiers; see `TierAllocation.tiers`.

        Args:
            capture: the layer.

        Returns:
            uint8 `[n]` on the CPU.
        """
        request = self._request
        octaves = step_octaves(capture, request.basis, request.scorer, request.seed, self._sinks)
        # Of tokens that nothing looks at the later ones come first, so that not all of them change tiers together.
        octaves = octaves - TIE_OCTAVES * np.linspace(0, 1, len(octaves))
        tiers = torch.from_numpy(self._tiers(octaves, capture.layer))
        self._layers_left -= 1
        return tiers

    def account(self, wire_bytes: int) -> None:
        """Take a segment's bytes off the budget.

        Args:
            wire_bytes: header, tier map and body.
        """
        self._left_bytes -= wire_bytes

    def _tiers(self, octaves: np.ndarray, layer: int) -> np.ndarray:
        """Return a layer's tiers, uint8 `[n]`, at the finest base step that later layers can have, too."""
        base = self._base(np.sort(octaves[self._sinks :]), layer)
        steps = base + octaves
        tiers = np.where(steps >= self._int4_from[layer], Tier.INT4, Tier.INT8)
        tiers[steps < self._int8_from[layer]] = Tier.FP16
        tiers[: self._sinks] = Tier.FP16
        return tiers.astype(np.uint8)

    def _base(self, octaves: np.ndarray, layer: int) -> float:
        """Find the base step with which this layer and all later ones, taken to be like it, fit what is left.

        Args:
            octaves: of the tokens that are no sinks, rising.
            layer: the present one.

        Returns:
            Binary logarithm of the step of a token of mean importance.
        """
        int4, int8, fp16 = (self._token_bytes[tier] for tier in (Tier.INT4, Tier.INT8, Tier.FP16))
        tokens = self._sinks + len(octaves)
        fixed = self._sinks * fp16 + SEGMENT_HEADER.size + tier_map_bytes(tokens)
        available = self._left_bytes - self._layers_left * fixed
        int8_from, int4_from = self._int8_from[layer:], self._int4_from[layer:]
        low = float(int8_from.min()) - (octaves[-1] if len(octaves) else 0.0) - 1
        high = float(int4_from.max()) - (octaves[0] if len(octaves) else 0.0) + 1
        while high - low > RESOLUTION:
            middle = (low + high) / 2
            at_fp16 = np.searchsorted(octaves, int8_from - middle).sum()
            above_int4 = np.searchsorted(octaves, int4_from - middle).sum()
            at_int4 = len(octaves) * self._layers_left - above_int4
            cost = at_int4 * int4 + (above_int4 - at_fp16) * int8 + at_fp16 * fp16
            low, high = (middle, high) if cost > available else (low, middle)
        return high


@lru_cache(maxsize=4)
def _thresholds(basis: CalibratedBasis) -> tuple[np.ndarray, np.ndarray]:
    """Return each layer's steps, as binary logarithms, from which on a token is nearest to INT8, and to INT4."""
    int8_from, int4_from = [], []
    for transform in LayerTransform.of_layers(basis):
        grid = STEP_GRID + float(basis.std[transform.layer].max().log2())
        bits = transform.calibrated.mean_bits(grid)
        int8_from.append(grid[int(np.argmax(bits <= INT8_BITS))])
        int4_from.append(grid[int(np.argmax(bits <= INT4_BITS))])
    return np.array(int8_from), np.array(int4_from)
