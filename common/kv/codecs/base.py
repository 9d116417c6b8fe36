"""What a codec is, and the registry of them.

A codec turns the keys and values of a run of tokens in one layer into bytes and back. It knows nothing of
requests, chunks or networks. Its byte layout is documented in proto/spectrumkv/v1/kv.proto; any change of
the layout raises `version`, so that old and new refuse each other by name.

There are two kinds. A `TierCodec` is told each token's tier by a policy. Other codecs spend a budget of bytes
themselves, and tell afterwards which tier each token came nearest to.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.common.registry import Registry


class SegmentDecoder(Protocol):
    """The receiving half of a codec, for one request."""

    def decode(self, segment: KvSegment, keys: torch.Tensor, values: torch.Tensor) -> Mapping[Tier, int]:
        """Write a segment's tokens; leave dropped tokens' elements alone.

        Args:
            segment: as it arrived; its body may be read-only.
            keys: `[kv_heads, n, head_dim]` in the model's own dtype, any strides, on any device: a view of the slots.
            values: like `keys`.

        Returns:
            How many bytes of the segment's body each tier took.

        Raises:
            DataLossError: the codec cannot write one of the tiers, or the body does not fit them.
        """
        ...


class Codec(Protocol):
    """What is known of every codec."""

    name: str
    version: int
    tiers: frozenset[Tier]
    """The tiers that tokens can have."""
    needs_basis: bool
    """Whether both sides need the same `SpectralBasis`."""

    def decoder(self, geometry: KvGeometry, basis: SpectralBasis | None) -> SegmentDecoder:
        """Return what decodes one request's segments.

        Raises:
            FailedPreconditionError: the codec needs a basis and there is none.
        """
        ...


@dataclass(frozen=True)
class EncodedSegment:
    """A run of tokens of one layer, coded.

    Attributes:
        body: uint8 `[b]` on the CPU, `b` even.
        tier_bytes: how many bytes of `body` each tier took.
    """

    body: torch.Tensor
    tier_bytes: dict[Tier, int]


class TierCodec(ABC):
    """Turns tensors into bytes and back, at the tier that each token was given. A `Codec`."""

    name: str
    version: int
    tiers: frozenset[Tier]
    needs_basis = False

    def decoder(self, geometry: KvGeometry, basis: SpectralBasis | None) -> SegmentDecoder:
        """See `Codec.decoder`; the basis is not looked at."""
        return _TierDecoder(self, geometry)

    @abstractmethod
    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, tiers: torch.Tensor, geometry: KvGeometry
    ) -> EncodedSegment:
        """Code `n` tokens.

        Args:
            keys: `[kv_heads, n, head_dim]` in `geometry.native_dtype`, any strides.
            values: like `keys`.
            tiers: uint8 `[n]` on the CPU.
            geometry: shape and dtype of the model's cache.

        Raises:
            InvalidArgumentError: an element is infinite, NaN or too large for its tier.
        """

    def encode_segments(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        tiers: torch.Tensor,
        cuts: Sequence[int],
        geometry: KvGeometry,
    ) -> Iterator[EncodedSegment]:
        """Code `n` tokens in several segments, one after another; see `encode`.

        Args:
            keys: see `encode`.
            values: see `encode`.
            tiers: see `encode`.
            cuts: the first token of each segment, rising from 0, and n.
            geometry: see `encode`.
        """
        for first, end in pairwise(cuts):
            yield self.encode(keys[:, first:end], values[:, first:end], tiers[first:end], geometry)

    @abstractmethod
    def decode(
        self,
        body: torch.Tensor,
        tiers: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        geometry: KvGeometry,
    ) -> dict[Tier, int]:
        """Write the tokens of `body` into `keys` and `values`; leave dropped tokens' elements alone.

        Args:
            body: uint8 `[b]` on the CPU, as `encode` made it; it may be read-only.
            tiers: uint8 `[n]` on the CPU.
            keys: `[kv_heads, n, head_dim]` in `geometry.native_dtype`, any strides, on any device: a view
                of the KV slots.
            values: like `keys`.
            geometry: shape and dtype of the model's cache.

        Returns:
            How many bytes of `body` each tier took, as in `EncodedSegment.tier_bytes`.

        Raises:
            DataLossError: the codec cannot write one of the tiers, the body's length does not fit them, or a
                scale is not finite.
        """


@dataclass(frozen=True)
class _TierDecoder:
    codec: TierCodec
    geometry: KvGeometry

    def decode(self, segment: KvSegment, keys: torch.Tensor, values: torch.Tensor) -> Mapping[Tier, int]:
        return self.codec.decode(segment.body, segment.tiers, keys, values, self.geometry)


codecs: Registry[Codec] = Registry("codec")


def tier_codecs() -> dict[str, TierCodec]:
    """The codecs that write the tiers of policies, by name."""
    return {name: codec for name in codecs if isinstance(codec := codecs.get(name), TierCodec)}


def needed_basis(codec: Codec, basis: SpectralBasis | None) -> SpectralBasis:
    """Return `basis`, which `codec` cannot do without.

    Raises:
        FailedPreconditionError: there is none.
    """
    if basis is None:
        raise FailedPreconditionError(
            f"codec {codec.name!r} needs a basis, and this service has none for its model; ask for another policy"
        )
    return basis
