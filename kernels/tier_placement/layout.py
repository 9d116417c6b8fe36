"""Where the bytes of a layer's tokens lie: its segments, back to back, and each token's row in its tier's sections.

A GPU's kernels read this as two small tables. The host makes them where it knows the tiers, as everywhere on decode,
and a kernel makes them (`triton`) where tiers follow from scores that lie on the GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from spectrumkv.kernels.tiers import TIER_16BIT, TIER_INT4, TIER_INT8, tier_counts

# What a segment's row of the table says: its last token's successor; the byte at which its body begins; how many
# tokens it has at INT4, INT8 and 16 bits, which is its tier's code further; and the element of the states at which
# the run of all tokens would begin, did it hold this segment's tokens where they are. Columns are left, so that a row
# has 64 bytes.
SEGMENT_COLUMNS = 8
END, BODY_AT, COUNTS_AT, STATES_AT = 0, 1, 1, 5
# The tiers whose tokens have bytes.
SENT_TIERS = (TIER_INT4, TIER_INT8, TIER_16BIT)


@dataclass(frozen=True)
class TierRanks:
    """Which tiers tokens get by the rank of their scores.

    Attributes:
        tiers: codes, at most four; the best tokens get the first one, the worst the last.
        counts: how many tokens get each.
        sinks: how many of the first tokens get 16 bits before the others are ranked.
    """

    tiers: tuple[int, ...]
    counts: tuple[int, ...]
    sinks: int = 0

    def __post_init__(self) -> None:
        if not 0 < len(self.tiers) == len(self.counts) <= len(SENT_TIERS) + 1 or min(*self.counts, self.sinks) < 0:
            raise ValueError(f"tiers {self.tiers}, counts {self.counts} and {self.sinks} sinks do not fit together")

    @property
    def tokens(self) -> int:
        """Count the tokens, sinks included."""
        return self.sinks + sum(self.counts)

    def of_tier(self, tier: int) -> int:
        """Count the tokens that get a tier.

        Args:
            tier: its code.

        Returns:
            Tokens, sinks included.
        """
        ranked = sum(count for one, count in zip(self.tiers, self.counts, strict=True) if one == tier)
        return ranked + (self.sinks if tier == TIER_16BIT else 0)


@dataclass(frozen=True)
class SegmentRoom:
    """What a segment may hold.

    Attributes:
        token_bytes: what a token takes of a body, by its tier's code up to 16 bits.
        most_bytes: of a body; a token that takes more has a segment to itself.
        most_tokens: of a segment.
    """

    token_bytes: tuple[int, ...]
    most_bytes: int
    most_tokens: int

    def body_bytes(self, ranks: TierRanks) -> int:
        """Return the bytes of all bodies of a layer.

        Args:
            ranks: which tiers its tokens get.
        """
        return sum(self.token_bytes[tier] * ranks.of_tier(tier) for tier in SENT_TIERS)

    def most_segments(self, ranks: TierRanks) -> int:
        """Return how many segments a layer can have, however its tokens are placed.

        Args:
            ranks: which tiers its tokens get.
        """
        least = self.most_bytes - max(self.token_bytes)
        if least <= 0:
            return ranks.tokens
        # Each but the last is full, by its bytes or by its tokens.
        return min(ranks.tokens, self.body_bytes(ranks) // least + ranks.tokens // self.most_tokens + 1)


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the bytes of some tokens lie, on the host.

    Attributes:
        segments: int64 `[s, SEGMENT_COLUMNS]`.
        places: int32 `[2, n]`: each token's segment, and its row in the sections of its tier there.
        tiers: uint8 `[n]`.
    """

    segments: np.ndarray
    places: np.ndarray
    tiers: np.ndarray


def placement_of(
    tiers: np.ndarray,
    boundaries: Sequence[int],
    token_bytes: Sequence[int],
    bodies_at: Sequence[int] | None = None,
    states_at: Sequence[int] | None = None,
) -> Placement:
    """Place tokens whose tiers and segments are known.

    Args:
        tiers: uint8 `[n]`, codes.
        boundaries: the first token of each segment, rising from 0, and n.
        token_bytes: what a token takes of a body, by its tier's code up to 16 bits.
        bodies_at: the byte at which each segment's body begins; None where they lie back to back.
        states_at: see `STATES_AT`; None where the tokens of all segments lie one after another.

    Returns:
        The placement.
    """
    segments = np.zeros((len(boundaries) - 1, SEGMENT_COLUMNS), np.int64)
    places = np.zeros((2, tiers.size), np.int32)
    body_at = 0
    for number, (first, end) in enumerate(pairwise(boundaries)):
        of_tokens = tiers[first:end]
        counts = tier_counts(of_tokens)
        segments[number, [END, BODY_AT]] = end, body_at
        for tier in SENT_TIERS:
            segments[number, COUNTS_AT + tier] = counts[tier]
            body_at += counts[tier] * token_bytes[tier]
            places[1, first:end][of_tokens == tier] = np.arange(counts[tier], dtype=np.int32)
        places[0, first:end] = number
    if bodies_at is not None:
        segments[:, BODY_AT] = bodies_at
    if states_at is not None:
        segments[:, STATES_AT] = states_at
    return Placement(segments, places, tiers)
