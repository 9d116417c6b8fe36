"""The codec "fixed_rate": its encoder and decoder factories, side by side, and its decoder."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.base import KvEncoder, SegmentDecoder, codecs
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis, identity_basis
from spectrumkv.common.kv.codecs.calibrated.codec import CalibratedCodec, check_tiers
from spectrumkv.common.kv.codecs.calibrated.request import CalibratedRequest
from spectrumkv.common.kv.codecs.encoder_request import EncoderRequest
from spectrumkv.common.kv.codecs.fixed_rate.encoder import FixedRateEncoder
from spectrumkv.common.kv.codecs.fixed_rate.kernel_fault import kernels_code
from spectrumkv.common.kv.codecs.fixed_rate.received import ReceivedBody, read_body, token_bytes, write_body
from spectrumkv.common.kv.codecs.fixed_rate.tiers import tier_bytes
from spectrumkv.common.kv.codecs.fixed_rate.transform import LayerTransform
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.policies.base import Policy
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.tiers import Tier

if TYPE_CHECKING:
    from spectrumkv.common.kv.codecs.fixed_rate.gpu.basis import DeviceBasis

# The policy whose bit allocation the codec shares with the codec of that name.
SPECTRAL = "spectral"


class FixedRateCodec(CalibratedCodec):
    """The codec that writes transform coefficients in records of fixed width; see `Codec`."""

    name = "fixed_rate"
    version = 2

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
        return FixedRateEncoder(self.calibrated(request))

    def decoder(self, geometry: KvGeometry, basis: Basis | None) -> SegmentDecoder:
        """Make a decoder; see `Codec.decoder`.

        Args:
            geometry: shape and dtype of the model's cache.
            basis: that Begin names.

        Returns:
            The decoder.
        """
        return FixedRateDecoder(self.calibrated_basis(basis, geometry), geometry)

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
        return token_bytes(read_body(transform, segment.body, segment.tiers.numel(), geometry), transform.rows)

    def writes(self, policy: Policy) -> bool:
        """Return whether the codec can write what a policy allocates: the bytes of policy "spectral"."""
        return policy.codec == SPECTRAL


codecs.register(FixedRateCodec.name)(FixedRateCodec())


class FixedRateDecoder:
    """A `MessageDecoder` of segments that were made with one basis.

    Args:
        basis: the one that Begin names; it fits the model's cache.
        geometry: shape and dtype of the model's cache.
    """

    def __init__(self, basis: CalibratedBasis, geometry: KvGeometry) -> None:
        self._basis = basis
        self._on_device: DeviceBasis | None = None
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
        received = self._read(segment)
        transform = self._transforms[segment.layer]
        write_body(transform, received, segment.first_token, self._geometry, keys, values)
        return self._shares(segment, received)

    def decode_all(
        self, segments: Sequence[KvSegment], slots: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> list[Mapping[Tier, int]]:
        """Write segments one by one on a CPU, all together on a GPU; see `MessageDecoder.decode_all`.

        Args:
            segments: as they arrived, at least one.
            slots: keys and values of each, views of one cache.

        Returns:
            For each segment the body's bytes by tier.

        Raises:
            DataLossError: a body does not hold what its header says; on a GPU nothing is written then.
        """
        if not kernels_code(slots[0][0].device):
            return [self.decode(segment, *states) for segment, states in zip(segments, slots, strict=True)]
        # Triton takes a while to import, and exists on Linux only.
        from spectrumkv.common.kv.codecs.fixed_rate.gpu.basis import device_basis
        from spectrumkv.common.kv.codecs.fixed_rate.gpu.slots import write_segments

        received = [self._read(segment) for segment in segments]
        # What is launched reads it later, and the decoder outlives that.
        self._on_device = device_basis(self._basis, slots[0][0].device)
        write_segments(self._on_device, segments, received, slots)
        return [self._shares(segment, body) for segment, body in zip(segments, received, strict=True)]

    def _read(self, segment: KvSegment) -> ReceivedBody:
        """Return a segment's body, taken apart and checked.

        Raises:
            DataLossError: the body does not hold what its header says.
        """
        check_tiers(FixedRateCodec.name, segment)
        return read_body(self._transforms[segment.layer], segment.body, segment.tiers.numel(), self._geometry)

    def _shares(self, segment: KvSegment, received: ReceivedBody) -> Mapping[Tier, int]:
        sink_bytes = self._geometry.fp16_bytes_per_layer(received.sinks)
        return tier_bytes(received.layout, segment.tiers, sink_bytes, segment.body.numel())


def prepare() -> None:
    """Compile what runs on CPUs, so that no request waits for it.

    It takes seconds where this machine never did, and a fraction of one where compiled code is in the cache.
    """
    heads, head_dim = 2, 4
    geometry = KvGeometry(1, heads, head_dim, torch.float32)
    basis = identity_basis(geometry)
    # A lone token's keys lie in one piece, those of several do not; scales of a segment's own need many of them.
    for tokens in (200, 1):
        states = torch.ones(tokens, heads, head_dim).transpose(0, 1)
        request = CalibratedRequest(basis, geometry, tokens, geometry.fp16_bytes(tokens), "position", 0)
        received = torch.zeros(2, heads, 2 * tokens, head_dim)[:, :, tokens:]
        decoder = FixedRateDecoder(basis, geometry)
        for segment in FixedRateEncoder(request).encode(
            LayerCapture(states[:, -1:], states, states, 1.0, None, None, 0)
        ):
            decoder.decode(segment, received[0], received[1])
