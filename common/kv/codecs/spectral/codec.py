"""The codec "spectral": its encoder and decoder factories, side by side, and its decoder."""

from collections.abc import Mapping

import numpy as np
import torch

from spectrumkv.common.kv.allocation import TierAllocation
from spectrumkv.common.kv.codecs.base import KvEncoder, SegmentDecoder, codecs
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis, identity_basis
from spectrumkv.common.kv.codecs.calibrated.codec import CalibratedCodec, check_tiers
from spectrumkv.common.kv.codecs.encoder_request import EncoderRequest
from spectrumkv.common.kv.codecs.spectral.coefficients import FEWEST_TOKENS
from spectrumkv.common.kv.codecs.spectral.encoder import SpectralEncoder
from spectrumkv.common.kv.codecs.spectral.layout import TokenClasses
from spectrumkv.common.kv.codecs.spectral.rate import LayerSymbols, RateControl
from spectrumkv.common.kv.codecs.spectral.segment_codec import (
    UncodedSegment,
    decode_segment,
    encode_segment,
    quantization_of,
)
from spectrumkv.common.kv.codecs.spectral.tier_allocation import SpectralTiers
from spectrumkv.common.kv.codecs.spectral.tiers import class_bits, tier_bytes, token_bytes
from spectrumkv.common.kv.codecs.spectral.transform import LayerTransform
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.tiers import Tier


class SpectralCodec(CalibratedCodec):
    """The codec that writes transform coefficients within a budget of counted bytes; see `Codec`."""

    name = "spectral"
    version = 4
    fallback = "fixed_rate"
    gpu_codec = "fixed_rate"

    def prepare(self, geometry: KvGeometry) -> None:
        """Compile the loops for CPUs, which are the same for every shape; see `Codec.prepare`."""
        prepare()

    def encoder(self, request: EncoderRequest) -> KvEncoder:
        """Make an encoder; see `Codec.encoder`.

        Args:
            request: with a byte budget.

        Returns:
            The encoder.
        """
        return SpectralEncoder(self.calibrated(request))

    def decoder(self, geometry: KvGeometry, basis: Basis | None) -> SegmentDecoder:
        """Make a decoder; see `Codec.decoder`.

        Args:
            geometry: shape and dtype of the model's cache.
            basis: that Begin names.

        Returns:
            The decoder.
        """
        return SpectralDecoder(self.calibrated_basis(basis, geometry), geometry)

    def bytes_of_tokens(self, segment: KvSegment, geometry: KvGeometry, basis: Basis | None) -> np.ndarray:
        """Return what each token takes; see `Codec.bytes_of_tokens`, and `token_bytes`.

        Args:
            segment: as the encoder made it.
            geometry: shape and dtype of the model's cache.
            basis: that the segment is coded in.

        Returns:
            float64 `[n]`.
        """
        transform = LayerTransform.of_layers(self.calibrated_basis(basis, geometry))[segment.layer]
        body = segment.body.numpy().data
        used = quantization_of(transform, body, segment.tiers.numel(), geometry)
        sink_bytes = geometry.fp16_bytes_per_layer(1)
        return token_bytes(class_bits(used.model, used.base), used.tokens, sink_bytes, len(body))

    def tier_allocation(self, request: EncoderRequest, token_bytes: Mapping[Tier, float]) -> TierAllocation:
        """Give each token the tier that is nearest to the bits it would get here; see `Codec.tier_allocation`.

        Args:
            request: with a byte budget.
            token_bytes: what a token of one layer takes of a body at INT4, INT8 and FP16.

        Returns:
            The allocation.
        """
        return SpectralTiers(self.calibrated(request), token_bytes)


codecs.register(SpectralCodec.name)(SpectralCodec())


class SpectralDecoder:
    """A `SegmentDecoder` of segments that were made with one basis.

    Args:
        basis: the one that Begin names; it fits the model's cache.
        geometry: shape and dtype of the model's cache.
    """

    def __init__(self, basis: CalibratedBasis, geometry: KvGeometry) -> None:
        self._geometry = geometry
        self._transforms = LayerTransform.of_layers(basis)

    def decode(self, segment: KvSegment, keys: torch.Tensor, values: torch.Tensor) -> Mapping[Tier, int]:
        """Write a segment's tokens; see `SegmentDecoder.decode`.

        Args:
            segment: as it arrived.
            keys: `[kv_heads, n, head_dim]`, a view of the slots.
            values: like `keys`.

        Returns:
            The body's bytes by tier.

        Raises:
            DataLossError: the body does not hold what its header says.
        """
        transform = self._transforms[segment.layer]
        check_tiers(SpectralCodec.name, segment)
        body = segment.body.numpy().data
        found = decode_segment(transform, body, segment.first_token, self._geometry, keys, values)
        bits = class_bits(found.model, found.base)
        return tier_bytes(bits, found.tokens, segment.tiers, segment.body.numel())


def prepare() -> None:
    """Compile what runs on CPUs, so that no request waits for it.

    It takes seconds where this machine never did, and a fraction of one where compiled code is in the cache.
    """
    heads, head_dim = 2, 4
    geometry = KvGeometry(1, heads, head_dim, torch.float32)
    basis = identity_basis(geometry)
    (transform,) = LayerTransform.of_layers(basis)
    # A lone token's keys lie in one piece, those of several do not.
    for tokens in (2 * FEWEST_TOKENS, 1):
        # As models leave keys, token by token, and as slots lie, head by head in something larger.
        sent, received = torch.ones(tokens, heads, head_dim).transpose(0, 1), torch.zeros(heads, 2 * tokens, head_dim)
        classes = TokenClasses(np.zeros(tokens, np.int64), sinks=tokens // 2)
        segment = UncodedSegment(transform, 0, sent, sent, classes)
        body, quantization = encode_segment(segment, 0.0, geometry)
        slots = received[:, tokens:]
        decode_segment(transform, memoryview(body), 0, geometry, slots, slots)
        class_bits(quantization.model, quantization.base)
        rate, symbols = RateControl(segment_bytes=1, basis=basis), LayerSymbols.of([segment])
        rate.expected_bytes(symbols, rate.base(symbols, 0), 0)
