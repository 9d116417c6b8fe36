"""The codec "fixed_rate": its encoder and decoder factories, side by side, and its decoder."""

from collections.abc import Mapping

import numpy as np
import torch

from spectrumkv.common.errors import DataLossError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.base import Codec, KvEncoder, SegmentDecoder, codecs
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.codecs.encoder_request import EncoderRequest
from spectrumkv.common.kv.codecs.fixed_rate.block_codec import decode_block
from spectrumkv.common.kv.codecs.fixed_rate.encoder import FixedRateEncoder
from spectrumkv.common.kv.codecs.fixed_rate.tiers import tier_bytes
from spectrumkv.common.kv.codecs.fixed_rate.transform import layer_transforms
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis, needed_spectral_basis
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.policies.base import Policy
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.tiers import Tier

# The policy whose bit allocation the codec shares with the codec of that name.
SPECTRAL = "spectral"


class FixedRateCodec(Codec):
    """The codec that writes transform coefficients in records of fixed width; see `Codec`."""

    name = "fixed_rate"
    version = 1
    tiers = frozenset({Tier.INT4, Tier.INT8, Tier.FP16})
    basis_type = SpectralBasis
    basis_free = "absmax"

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
        return FixedRateEncoder(
            basis=needed_spectral_basis(self, request.basis),
            geometry=request.geometry,
            tokens=request.tokens,
            segment_bytes=request.segment_bytes,
            scorer=request.scorer,
            seed=request.seed,
        )

    def decoder(self, geometry: KvGeometry, basis: Basis | None) -> SegmentDecoder:
        """Make a decoder; see `Codec.decoder`.

        Args:
            geometry: shape and dtype of the model's cache.
            basis: that Begin names.

        Returns:
            The decoder.
        """
        return FixedRateDecoder(needed_spectral_basis(self, basis), geometry)

    def writes(self, policy: Policy) -> bool:
        """Return whether the codec can write what a policy allocates: the bytes of policy "spectral"."""
        return policy.codec == SPECTRAL


codecs.register(FixedRateCodec.name)(FixedRateCodec())


class FixedRateDecoder:
    """A `SegmentDecoder` of segments that were made with one basis.

    Args:
        basis: the one that Begin names.
        geometry: shape and dtype of the model's cache.
    """

    def __init__(self, basis: SpectralBasis, geometry: KvGeometry) -> None:
        basis.check_fits(geometry)
        self._geometry = geometry
        self._transforms = layer_transforms(basis)

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
        of_each = np.bincount(segment.tiers.numpy(), minlength=len(Tier))
        if of_each[Tier.DROP] or of_each[Tier.NATIVE]:
            raise DataLossError("codec fixed_rate sends every token, at INT4, INT8 or FP16", "tier")
        transform = self._transforms[segment.layer]
        layout, sinks = decode_block(transform, segment.body, segment.first_token, self._geometry, keys, values)
        sink_bytes = self._geometry.fp16_bytes_per_layer(sinks)
        return tier_bytes(layout, segment.tiers, sink_bytes, segment.body.numel())


def prepare() -> None:
    """Compile what runs on CPUs, so that no request waits for it.

    It takes seconds where this machine never did, and a fraction of one where compiled code is in the cache.
    """
    heads, head_dim = 2, 4
    geometry = KvGeometry(1, heads, head_dim, torch.float32)
    lead = (1, 2, heads)
    basis = SpectralBasis(
        mean=torch.zeros(*lead, head_dim),
        analysis=torch.eye(head_dim).expand(*lead, -1, -1).contiguous(),
        std=torch.ones(*lead, head_dim),
        attention_exponent=torch.ones(1),
        rope_frequencies=torch.ones(1, head_dim // 2, dtype=torch.float64),
        rope_scaling=torch.ones(1, dtype=torch.float64),
    )
    # A lone token's keys lie in one piece, those of several do not; scales of a block's own need many of them.
    for tokens in (200, 1):
        states = torch.ones(tokens, heads, head_dim).transpose(0, 1)
        encoder = FixedRateEncoder(basis, geometry, tokens, geometry.fp16_bytes(tokens), "position", 0)
        received = torch.zeros(2, heads, 2 * tokens, head_dim)[:, :, tokens:]
        decoder = FixedRateDecoder(basis, geometry)
        for segment in encoder.encode(LayerCapture(states[:, -1:], states, states, 1.0, None, None, 0)):
            decoder.decode(segment, received[0], received[1])
