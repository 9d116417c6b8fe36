"""Decodes the segments of a message together, where one call of a GPU can write them all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from spectrumkv.common.kv.codecs.base import SegmentDecoder
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.tiers import Tier

if TYPE_CHECKING:
    from spectrumkv.common.kv.codecs.tiered import TierCodec


@runtime_checkable
class MessageDecoder(SegmentDecoder, Protocol):
    """A `SegmentDecoder` that takes all segments of a message at once, of which a GPU then makes one call."""

    def decode_all(
        self, segments: Sequence[KvSegment], slots: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> list[Mapping[Tier, int]]:
        """Write the tokens of segments; see `SegmentDecoder.decode`.

        Args:
            segments: as they arrived, at least one.
            slots: keys and values of each, views of one cache.

        Returns:
            For each segment how many bytes of its body each tier took.

        Raises:
            DataLossError: the codec cannot write one of the tiers, or a body does not fit them.
        """
        ...


@dataclass(frozen=True)
class TierDecoder:
    """A `MessageDecoder` of a codec that is told each token's tier.

    Attributes:
        codec: wrote the segments.
        geometry: shape and dtype of the model's cache.
    """

    codec: "TierCodec"
    geometry: KvGeometry

    def decode(self, segment: KvSegment, keys: torch.Tensor, values: torch.Tensor) -> Mapping[Tier, int]:
        """Write a segment's tokens; see `SegmentDecoder.decode`.

        Args:
            segment: see there, as for the others.
            keys: see there.
            values: see there.

        Returns:
            How many bytes of the segment's body each tier took.
        """
        return self.codec.decode(segment.body, segment.tiers, keys, values, self.geometry)

    def decode_all(
        self, segments: Sequence[KvSegment], slots: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> list[Mapping[Tier, int]]:
        """Write the tokens of segments; see `MessageDecoder.decode_all`.

        Args:
            segments: see there, as for the other.
            slots: see there.

        Returns:
            For each segment how many bytes of its body each tier took.
        """
        bodies, tiers = [one.body for one in segments], [one.tiers for one in segments]
        return [*self.codec.decode_segments(bodies, tiers, slots, self.geometry)]
