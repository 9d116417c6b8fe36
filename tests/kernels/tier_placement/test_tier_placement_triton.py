"""Ranks and places by the kernel against a stable sort; Triton runs under its interpreter where there is no GPU."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrumkv.kernels.tier_placement import Placement, SegmentRoom, TierRanks, placement_of
from spectrumkv.kernels.tier_placement import triton as tier_placement_triton
from spectrumkv.kernels.tiers import TIER_16BIT, TIER_DROP, TIER_INT4, TIER_INT8
from tests.kernels.absmax.states import DEVICE

TOKEN_BYTES = (0, 34, 66, 128)


def ranked(scores: torch.Tensor, ranks: TierRanks) -> np.ndarray:
    """Tiers by sorting; of equal scores the later one comes first."""
    tiers = np.full(ranks.tokens, TIER_16BIT, np.uint8)
    others = scores[ranks.sinks :]
    order = ranks.tokens - 1 - torch.argsort(others.flip(0), descending=True, stable=True).numpy()
    tiers[order] = np.repeat(np.array(ranks.tiers, np.uint8), ranks.counts)
    return tiers


def boundaries(tiers: np.ndarray, room: SegmentRoom) -> list[int]:
    """Segments that hold as much as they may, token by token."""
    firsts, held = [0], 0
    for token, tier in enumerate(tiers):
        held += room.token_bytes[tier]
        full = held > room.most_bytes or token - firsts[-1] >= room.most_tokens
        if full and token > firsts[-1]:
            firsts.append(token)
            held = room.token_bytes[tier]
    return [*firsts, len(tiers)]


def placed(scores: torch.Tensor, ranks: TierRanks, room: SegmentRoom) -> tuple[Placement, int]:
    """What the kernel makes of scores, and how many of them it found not finite."""
    tokens = ranks.tokens
    found = torch.full((2,), -7, device=DEVICE)
    segments = torch.full((room.most_segments(ranks), 8), -7, device=DEVICE)
    places = torch.full((2, tokens), -7, dtype=torch.int32, device=DEVICE)
    tiers = torch.full((tokens,), 200, dtype=torch.uint8, device=DEVICE)
    tier_placement_triton.rank_and_place(scores.to(DEVICE), ranks, room, found, segments, places, tiers)
    not_finite, number = found.tolist()
    return Placement(segments[:number].cpu().numpy(), places.cpu().numpy(), tiers.cpu().numpy()), not_finite


def assert_placed(scores: torch.Tensor, ranks: TierRanks, room: SegmentRoom) -> None:
    actual, not_finite = placed(scores, ranks, room)
    assert not_finite == 0
    tiers = ranked(scores, ranks)
    assert actual.tiers.tolist() == tiers.tolist()
    expected = placement_of(tiers, boundaries(tiers, room), room.token_bytes)
    assert actual.segments[:, :6].tolist() == expected.segments[:, :6].tolist()
    # A dropped token has no row.
    sent = tiers != TIER_DROP
    assert actual.places[0].tolist() == expected.places[0].tolist()
    assert actual.places[1][sent].tolist() == expected.places[1][sent].tolist()


@settings(max_examples=10)
@given(data=st.data())
def test_tiers_and_places_are_those_of_a_stable_sort(data: st.DataObject) -> None:
    sinks = data.draw(st.integers(0, 3))
    tiers = data.draw(st.permutations([TIER_DROP, TIER_INT4, TIER_INT8, TIER_16BIT]))[: data.draw(st.integers(1, 4))]
    counts = [data.draw(st.integers(0, 9)) for _ in tiers]
    counts[0] += 1
    ranks = TierRanks(tuple(tiers), tuple(counts), sinks)
    few = st.sampled_from([-0.0, 0.0, 1.0, -1.0, 1e-45, 3e38, -3e38])
    scores = data.draw(st.lists(few | st.floats(width=32, allow_nan=False, allow_infinity=False),
                                min_size=ranks.tokens, max_size=ranks.tokens))  # fmt: skip
    room = SegmentRoom(TOKEN_BYTES, data.draw(st.integers(1, 900)), data.draw(st.integers(1, 40)))
    with patch.object(tier_placement_triton, "BLOCK_TOKENS", data.draw(st.sampled_from([4, 16, 64]))):
        assert_placed(torch.tensor(scores), ranks, room)


@pytest.mark.parametrize("tokens", [1023, 1024, 2500])
def test_prompts_of_several_blocks_are_placed(tokens: int) -> None:
    scores = torch.randn(tokens, generator=torch.Generator().manual_seed(tokens)).round(decimals=1)
    counts = (tokens // 5, tokens // 3, tokens - 4 - tokens // 5 - tokens // 3)
    assert_placed(scores, TierRanks((3, 2, 1), counts, sinks=4), SegmentRoom(TOKEN_BYTES, 30_000, 700))


@pytest.mark.parametrize("poison", [torch.nan, -torch.nan, torch.inf, -torch.inf], ids=str)
def test_scores_that_are_not_finite_are_counted_and_every_token_has_a_place(poison: float) -> None:
    scores = torch.arange(20, dtype=torch.float32)
    scores[[3, 11]] = poison
    ranks = TierRanks((TIER_INT8, TIER_INT4), (8, 12))
    placement, not_finite = placed(scores, ranks, SegmentRoom(TOKEN_BYTES, 300, 99))
    assert not_finite == 2
    assert sorted(placement.tiers.tolist()) == [1] * 12 + [2] * 8
    assert placement.segments[-1, 0] == 20


def test_tiers_and_counts_must_fit_together() -> None:
    with pytest.raises(ValueError, match="do not fit together"):
        TierRanks((TIER_INT8, TIER_INT4), (8,))
