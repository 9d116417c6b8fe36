"""Tokens by the rank of their scores: what most policies give tiers by."""

from collections.abc import Mapping

import torch

from spectrumkv.common.errors import NotFiniteError
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.kernels.tier_placement import TierRanks


def best_first(scores: torch.Tensor) -> torch.Tensor:
    """Order tokens from the most to the least important.

    Of tokens with equal scores the later one comes first, as recency is what the paper's importance falls back on.

    Args:
        scores: float32 `[n]` on any device.

    Returns:
        int64 `[n]` on the CPU, a permutation.

    Raises:
        NotFiniteError: a score on a GPU is infinite or NaN.
    """
    on_host = scores.cpu()
    if scores.is_cuda:
        check_scores(on_host)
    return scores.numel() - 1 - torch.argsort(on_host.flip(0), descending=True, stable=True)


def check_scores(scores: torch.Tensor) -> None:
    """Refuse scores that are not all finite.

    Args:
        scores: float32 `[n]`.

    Raises:
        NotFiniteError: a score is infinite or NaN.
    """
    if not scores.isfinite().all():
        token = int((~scores.isfinite()).nonzero()[0])
        raise NotFiniteError(
            f"the score of token {token} is {float(scores[token])}; scores must be finite, "
            "which they are where the model's keys and queries are"
        )


def by_rank(tokens: int, counts: Mapping[Tier, int], sinks: int = 0) -> TierRanks:
    """Give the best tokens the first tier of `counts`, the next ones the second, and drop the rest.

    Args:
        tokens: n.
        counts: tokens at each tier.
        sinks: how many of the first tokens get FP16, whatever their scores; with `counts` n at most.

    Returns:
        The tiers by rank.
    """
    dropped = tokens - sinks - sum(counts.values())
    everything = {**counts, Tier.DROP: dropped} if dropped else counts
    return TierRanks(tuple(everything), tuple(everything.values()), sinks)


def ranked(scores: torch.Tensor, ranks: TierRanks) -> torch.Tensor:
    """Give tokens the tiers of their ranks, on the CPU.

    Args:
        scores: float32 `[n]` on any device.
        ranks: for as many tokens.

    Returns:
        uint8 `[n]` on the CPU, `Tier` values.
    """
    order = best_first(scores)
    counts = {Tier(tier): count for tier, count in zip(ranks.tiers, ranks.counts, strict=True)}
    if not ranks.sinks:
        return fill(order, counts)
    others = fill(order[order >= ranks.sinks] - ranks.sinks, counts)
    return torch.cat([torch.full((ranks.sinks,), Tier.FP16, dtype=torch.uint8), others])


def fill(order: torch.Tensor, counts: Mapping[Tier, int]) -> torch.Tensor:
    """Give the first tokens of `order` the first tier of `counts`, the next ones the second, and drop the rest.

    Args:
        order: int64 `[n]`, a permutation of the tokens.
        counts: tokens at each tier, n at most together.

    Returns:
        uint8 `[n]` on the CPU, `Tier` values.
    """
    tiers = torch.full((order.numel(),), Tier.DROP, dtype=torch.uint8)
    start = 0
    for tier, count in counts.items():
        tiers[order[start : start + count]] = tier
        start += count
    return tiers
