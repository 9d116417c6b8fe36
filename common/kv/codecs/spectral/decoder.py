"""A segment of the spectral codec into the slots."""

from collections.abc import Mapping

import numpy as np
import torch

from spectrumkv.common.errors import DataLossError
from spectrumkv.common.kv.codecs.spectral.accounting import class_bits, tier_bytes
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.kv.codecs.spectral.segment_codec import decode_segment
from spectrumkv.common.kv.codecs.spectral.transform import layer_transforms
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.tiers import Tier


class SpectralDecoder:
    """Decodes segments made with one basis.

    Args:
        basis: the one that Begin names.
        geometry: shape and dtype of the model's cache.
    """

    def __init__(self, basis: SpectralBasis, geometry: KvGeometry) -> None:
        basis.check_fits(geometry)
        self._geometry = geometry
        self._transforms = layer_transforms(basis)

    def decode(self, segment: KvSegment, keys: torch.Tensor, values: torch.Tensor) -> Mapping[Tier, int]:
        """Write a segment's tokens into views of the slots, `[kv_heads, n, head_dim]`; return its bytes by tier.

        Raises:
            DataLossError: the body does not hold what its header says.
        """
        transform = self._transforms[segment.layer]
        of_each = np.bincount(segment.tiers.numpy(), minlength=len(Tier))
        if of_each[Tier.DROP] or of_each[Tier.NATIVE]:
            raise DataLossError("codec spectral sends every token, at INT4, INT8 or FP16", "tier")
        body = segment.body.numpy().data
        steps = decode_segment(transform, body, segment.first_token, self._geometry, keys, values)
        return tier_bytes(class_bits(transform, steps.base), steps.tokens, segment.tiers, segment.body.numel())
