"""The spectral allocation at whole widths: for links that are faster than the entropy coder.

A token is given the tier that is nearest to the bits that the spectral codec would spend on it, and a `TierCodec`
writes that. The budget is the same, and so is who gets how much of it; the transform and the coder, which make
the same bits say more, are what is given up.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from spectrumkv.common.kv.codecs.base import TierCodec
from spectrumkv.common.kv.codecs.spectral.accounting import INT4_BITS, INT8_BITS
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.kv.codecs.spectral.importance import affordable_sinks, step_octaves
from spectrumkv.common.kv.codecs.spectral.transform import layer_transforms
from spectrumkv.common.kv.codecs.tiered import tier_segments, token_bytes
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.scoring import LayerCapture
from spectrumkv.common.kv.segment import SEGMENT_HEADER, KvSegment
from spectrumkv.common.kv.tiers import Tier, tier_map_bytes

# Base steps, relative to a layer's widest spread, between which its tokens go from 16 bits to 4.
STEP_GRID = np.arange(-20, 12, 1 / 32)
# How far apart the first and the last token are that get the same attention, and the finest difference of steps.
TIE_OCTAVES, RESOLUTION = 1e-3, 1e-7


def least_budget(codec: TierCodec, geometry: KvGeometry) -> float:
    """The least counted budget that fixed widths can keep to, framing left out: every token at INT4."""
    return token_bytes(codec, Tier.INT4, geometry) / geometry.fp16_bytes_per_layer(1)


class FixedWidthEncoder:
    """Codes the layers of one prompt in their order. A `KvEncoder`.

    Args:
        basis: of the model.
        codec: writes INT4, INT8 and FP16.
        geometry: shape and dtype of the model's cache.
        tokens: of the prompt.
        budget_bytes: for all layers' segments, headers and tier maps included. What is too little even for INT4
            everywhere is exceeded.
        scorer: name of the scorer that ranks tokens.
    """

    def __init__(
        self,
        basis: SpectralBasis,
        codec: TierCodec,
        geometry: KvGeometry,
        tokens: int,
        budget_bytes: int,
        scorer: str,
    ) -> None:
        basis.check_fits(geometry)
        self._basis = basis
        self._codec = codec
        self._geometry = geometry
        self._scorer = scorer
        self._left_bytes = budget_bytes
        self._layers_left = geometry.layers
        self._sinks = affordable_sinks(budget_bytes, geometry) if tokens > 1 else 0
        self._int8_from, self._int4_from = _thresholds(basis)

    def encode(self, capture: LayerCapture) -> Iterator[KvSegment]:
        """See `KvEncoder.encode`."""
        octaves = step_octaves(capture, self._basis, self._scorer, self._sinks)
        # Of tokens that nothing looks at the later ones come first, so that not all of them change tiers together.
        octaves = octaves - TIE_OCTAVES * np.linspace(0, 1, len(octaves))
        tiers = torch.from_numpy(self._tiers(octaves, capture.layer))
        self._layers_left -= 1
        for segment in tier_segments(self._codec, capture, tiers, self._geometry):
            self._left_bytes -= segment.wire_bytes
            yield segment

    def _tiers(self, octaves: np.ndarray, layer: int) -> np.ndarray:
        """Tiers of a layer's tokens, uint8 `[n]`: at the finest base step that later layers can have, too."""
        base = self._base(np.sort(octaves[self._sinks :]), layer)
        steps = base + octaves
        tiers = np.where(steps >= self._int4_from[layer], Tier.INT4, Tier.INT8)
        tiers[steps < self._int8_from[layer]] = Tier.FP16
        tiers[: self._sinks] = Tier.FP16
        return tiers.astype(np.uint8)

    def _base(self, octaves: np.ndarray, layer: int) -> float:
        """The base step with which this and all later layers, whose tokens are taken to be alike, fit what is left.

        Args:
            octaves: of the tokens that are no sinks, rising.
            layer: the present one.
        """
        int4, int8, fp16 = (
            token_bytes(self._codec, tier, self._geometry) for tier in (Tier.INT4, Tier.INT8, Tier.FP16)
        )
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
def _thresholds(basis: SpectralBasis) -> tuple[np.ndarray, np.ndarray]:
    """For each layer the steps, as binary logarithms, from which on a token is nearest to INT8, and to INT4."""
    int8_from, int4_from = [], []
    for transform in layer_transforms(basis):
        grid = STEP_GRID + float(basis.spread[transform.layer].max().log2())
        bits = transform.mean_bits(grid)
        int8_from.append(grid[int(np.argmax(bits <= INT8_BITS))])
        int4_from.append(grid[int(np.argmax(bits <= INT4_BITS))])
    return np.array(int8_from), np.array(int4_from)
