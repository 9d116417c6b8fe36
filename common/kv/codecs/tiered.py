"""A prompt's layers to segments: the sending half of codecs, for one request."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from spectrumkv.common.kv.codecs.base import TierCodec
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.policies.base import Policy, TierRequest
from spectrumkv.common.kv.policies.int4_layers import Int4Layers
from spectrumkv.common.kv.scoring import LayerCapture, combine, scorers
from spectrumkv.common.kv.segment import MAX_CHUNK_PAYLOAD_BYTES, KvSegment
from spectrumkv.common.kv.tiers import Tier

# Of a chunk's payload, what a segment's header and tier map may take, at two bits a token.
SEGMENT_OVERHEAD_BYTES = 64 << 10
MAX_SEGMENT_TOKENS = 128 << 10
# What a token's bytes are measured on.
TRIAL_TOKENS = 64


class KvEncoder(Protocol):
    """Codes the layers of one prompt."""

    def encode(self, capture: LayerCapture) -> Iterator[KvSegment]:
        """Take the next layer, in the model's order, and yield the segments that are ready.

        Raises:
            InvalidArgumentError: an element is infinite, NaN or too large for its tier.
        """
        ...


@dataclass
class TieredEncoder:
    """Scores tokens, gives them tiers by a policy, and codes them at those.

    Attributes:
        policy: gives tokens their tiers.
        budget: mean nominal cost per token, in the policy's range.
        scorer: name of the scorer.
        codec: writes the tiers.
        scope: "layer": a layer's tokens get tiers by its own scores, and its segments are ready at once. "model": a
            token has one tier in all layers, and all segments are ready after the last layer.
        int4: layers that may be sent at INT4, for policies that heed it.
        seed: for policies that draw.
        geometry: shape and dtype of the model's cache.
    """

    policy: Policy
    budget: float
    scorer: str
    codec: TierCodec
    scope: str
    int4: Int4Layers
    seed: int
    geometry: KvGeometry
    _held: list[LayerCapture] = field(default_factory=list, init=False)

    def encode(self, capture: LayerCapture) -> Iterator[KvSegment]:
        """See `KvEncoder.encode`."""
        if self.scope == "layer":
            yield from self.segments(capture, self.tiers_of(capture))
            return
        self._held.append(capture)
        if len(self._held) == self.geometry.layers:
            scores = combine([self._score(layer) for layer in self._held])
            # A token has one tier in all layers, so that one layer without INT4 keeps it from all.
            tiers = self.policy.assign(TierRequest(scores, self.budget, self.int4.everywhere, self.seed))
            while self._held:
                yield from self.segments(self._held.pop(0), tiers)

    def tiers_of(self, capture: LayerCapture) -> torch.Tensor:
        """Tiers of one layer's tokens by that layer's own scores: uint8 `[n]` on the CPU."""
        layer, budget = capture.layer, self.budget
        if self.policy.heeds_int4:
            budget = self.int4.layer_budget(layer, budget, self.geometry.layers)
        # A policy that draws must not draw the same tokens in every layer.
        request = TierRequest(self._score(capture), budget, self.int4.allows(layer), self.seed + layer)
        return self.policy.assign(request)

    def _score(self, capture: LayerCapture) -> torch.Tensor:
        """Scores of one layer's tokens, float32 `[n]`; zeros where the policy does not look at them."""
        if not self.policy.needs_scores:
            return torch.zeros(capture.keys.shape[1])
        return scorers.get(self.scorer)(capture)

    def segments(self, capture: LayerCapture, tiers: torch.Tensor) -> Iterator[KvSegment]:
        """Code a layer's tokens at these tiers; see `tier_segments`."""
        return tier_segments(self.codec, capture, tiers, self.geometry)


def tier_segments(
    codec: TierCodec, capture: LayerCapture, tiers: torch.Tensor, geometry: KvGeometry
) -> Iterator[KvSegment]:
    """Code a layer's tokens at these tiers, uint8 `[n]` on the CPU, in as few runs as fit chunks."""
    cuts = _segment_cuts(codec, tiers, geometry)
    coded = codec.encode_segments(capture.keys, capture.values, tiers, cuts, geometry)
    for (first, end), segment in zip(pairwise(cuts), coded, strict=True):
        yield KvSegment(capture.layer, capture.first + first, tiers[first:end], segment.body, segment.tier_bytes)


def _segment_cuts(codec: TierCodec, tiers: torch.Tensor, geometry: KvGeometry) -> list[int]:
    """The first token of each segment, and how many tokens there are."""
    taken = np.array([token_bytes(codec, tier, geometry) if tier in codec.tiers else 0.0 for tier in Tier])
    ends = np.cumsum(taken[tiers.numpy()])
    cuts, before = [0], 0.0
    while cuts[-1] < tiers.numel():
        fitting = int(np.searchsorted(ends, before + MAX_CHUNK_PAYLOAD_BYTES - SEGMENT_OVERHEAD_BYTES, side="right"))
        cuts.append(min(max(fitting, cuts[-1] + 1), cuts[-1] + MAX_SEGMENT_TOKENS))
        before = float(ends[cuts[-1] - 1])
    return cuts


@lru_cache(maxsize=64)
def token_bytes(codec: TierCodec, tier: Tier, geometry: KvGeometry) -> float:
    """What a token of one layer takes of a body at a tier."""
    states = torch.zeros(geometry.kv_heads, TRIAL_TOKENS, geometry.head_dim, dtype=geometry.native_dtype)
    tiers = torch.full((TRIAL_TOKENS,), tier, dtype=torch.uint8)
    return codec.encode(states, states, tiers, geometry).body.numel() / TRIAL_TOKENS
