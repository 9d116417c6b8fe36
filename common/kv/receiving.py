"""The receiving half of a transfer: from verified segments to keys and values, wherever the receiver keeps those."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from spectrumkv.common.kv.codecs.base import SegmentDecoder
from spectrumkv.common.kv.codecs.tier_decoder import MessageDecoder
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.tiers import Tier


class KvSlots(Protocol):
    """Where one prompt's keys and values go: the slots of a pool, or memory of another engine."""

    def keys(self, layer: int, first: int, end: int) -> torch.Tensor:
        """Return where the keys of some tokens of a layer go.

        Args:
            layer: from 0.
            first: position of the first token.
            end: position after the last one.

        Returns:
            `[kv_heads, end - first, head_dim]` in the model's own dtype, any strides: a view.
        """
        ...

    def values(self, layer: int, first: int, end: int) -> torch.Tensor:
        """Return where the values of some tokens of a layer go; see `keys`."""
        ...

    def drop(self, layer: int, tokens: torch.Tensor) -> None:
        """Take in that some tokens of a layer were not sent.

        Args:
            layer: from 0.
            tokens: int64 `[n]`, positions.
        """
        ...


class SegmentWriter:
    """Decodes segments into slots.

    Args:
        decoder: decodes segments in the codec that the sender names.
        slots: of the prompt.
    """

    def __init__(self, decoder: SegmentDecoder, slots: KvSlots) -> None:
        self._decoder = decoder
        self._slots = slots

    def write(self, segments: Sequence[KvSegment]) -> list[Mapping[Tier, int]]:
        """Decode segments into the slots.

        Args:
            segments: of one chunk, as `ChunkReader.read` verified them.

        Returns:
            For each segment how many bytes of its body each tier took.

        Raises:
            DataLossError: a segment's body is malformed.
        """
        views = [self._views(segment) for segment in segments]
        if isinstance(self._decoder, MessageDecoder):
            tier_bytes = list(self._decoder.decode_all(segments, views))
        else:
            tier_bytes = [
                self._decoder.decode(segment, *states) for segment, states in zip(segments, views, strict=True)
            ]
        for segment in segments:
            dropped = np.flatnonzero(segment.tiers.numpy() == Tier.DROP)
            if dropped.size:
                self._slots.drop(segment.layer, torch.from_numpy(dropped + segment.first_token))
        return tier_bytes

    def _views(self, segment: KvSegment) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where a segment's keys and values go."""
        first, end = segment.first_token, segment.first_token + segment.tiers.numel()
        return self._slots.keys(segment.layer, first, end), self._slots.values(segment.layer, first, end)
