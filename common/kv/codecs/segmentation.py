"""Cuts a layer into segments, as few as fit chunks, by what its tokens take at their tiers, and has them coded."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from spectrumkv.common.kv.allocation import RankedTiers
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import MAX_CHUNK_PAYLOAD_BYTES, KvSegment
from spectrumkv.common.kv.tiers import Tier

if TYPE_CHECKING:
    from spectrumkv.common.kv.codecs.tiered import TierCodec

# Of a chunk's payload, what a segment's header and tier map may take, at two bits a token.
SEGMENT_OVERHEAD_BYTES = 64 << 10
MAX_BODY_BYTES = MAX_CHUNK_PAYLOAD_BYTES - SEGMENT_OVERHEAD_BYTES
MAX_SEGMENT_TOKENS = 128 << 10
# What a token's bytes are measured on.
TRIAL_TOKENS = 64


def tier_segments(
    codec: "TierCodec", capture: LayerCapture, tiers: torch.Tensor | RankedTiers, geometry: KvGeometry
) -> Iterator[KvSegment]:
    """Code a layer's tokens at given tiers, in as few runs as fit chunks.

    Args:
        codec: writes the tiers.
        capture: the layer.
        tiers: uint8 `[n]` on the CPU, or what they follow from.
        geometry: shape and dtype of the model's cache.

    Yields:
        The layer's segments.
    """
    if isinstance(tiers, RankedTiers):
        first = capture.first
        for of_tokens, coded_on_gpu in codec.encode_ranked(capture.keys, capture.values, tiers, geometry):
            yield KvSegment(capture.layer, first, of_tokens, coded_on_gpu.body, coded_on_gpu.tier_bytes)
            first += of_tokens.numel()
        return
    boundaries = segment_boundaries(codec, tiers, geometry)
    coded = codec.encode_segments(capture.keys, capture.values, tiers, boundaries, geometry)
    for (first, end), segment in zip(pairwise(boundaries), coded, strict=True):
        yield KvSegment(capture.layer, capture.first + first, tiers[first:end], segment.body, segment.tier_bytes)


def segment_boundaries(codec: "TierCodec", tiers: torch.Tensor, geometry: KvGeometry) -> list[int]:
    """Cut a layer.

    Args:
        codec: writes the tiers.
        tiers: uint8 `[n]` on the CPU.
        geometry: shape and dtype of the model's cache.

    Returns:
        The first token of each segment, rising from 0, and n.
    """
    taken = np.array([token_bytes(codec, tier, geometry) if tier in codec.tiers else 0.0 for tier in Tier])
    ends = np.cumsum(taken[tiers.numpy()])
    boundaries, before = [0], 0.0
    while boundaries[-1] < tiers.numel():
        fitting = int(np.searchsorted(ends, before + MAX_BODY_BYTES, side="right"))
        boundaries.append(min(max(fitting, boundaries[-1] + 1), boundaries[-1] + MAX_SEGMENT_TOKENS))
        before = float(ends[boundaries[-1] - 1])
    return boundaries


@lru_cache(maxsize=64)
def token_bytes(codec: "TierCodec", tier: Tier, geometry: KvGeometry) -> float:
    """Measure what a token of one layer takes of a body at a tier.

    Args:
        codec: writes the tier.
        tier: one of the codec's.
        geometry: shape and dtype of the model's cache.

    Returns:
        Bytes.
    """
    states = torch.zeros(geometry.kv_heads, TRIAL_TOKENS, geometry.head_dim, dtype=geometry.native_dtype)
    tiers = torch.full((TRIAL_TOKENS,), tier, dtype=torch.uint8)
    return codec.encode(states, states, tiers, geometry).body.numel() / TRIAL_TOKENS
