"""Tiers by the rank of scores, and where each token's bytes lie: what a GPU decides without the host's waiting."""

from spectrumkv.kernels.tier_placement.layout import Placement, SegmentRoom, TierRanks, placement_of

__all__ = ["Placement", "SegmentRoom", "TierRanks", "placement_of"]
