"""What the paper's policies are measured against: one precision for all tokens, chance, and plain selection.

n is the number of tokens and b the tier budget. A budget is a ceiling, so a policy of one precision accepts every
budget that covers its cost, and costs no more for it.
"""

import numpy as np
from torch import Tensor, from_numpy, full, uint8

from spectrumkv.common.kv.policies.base import TierRequest, policy, whole_tokens
from spectrumkv.common.kv.policies.paper import greedy_counts
from spectrumkv.common.kv.policies.ranks import by_rank, fill
from spectrumkv.common.kv.scoring import SINK_TOKENS
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.kernels.tier_placement import TierRanks


@policy("native", min_budget=1.0, codec="native", needs_scores=False, token_by_token=True)
def native(request: TierRequest) -> Tensor:
    """Return the model's own dtype for every token, bit for bit."""
    return _uniform(request, Tier.NATIVE)


@policy("fp16", min_budget=1.0, needs_scores=False, token_by_token=True)
def fp16(request: TierRequest) -> Tensor:
    """Return the 16-bit dtype for every token."""
    return _uniform(request, Tier.FP16)


@policy("uniform-int8", min_budget=0.5, needs_scores=False, token_by_token=True)
def uniform_int8(request: TierRequest) -> Tensor:
    """Return INT8 for every token."""
    return _uniform(request, Tier.INT8)


@policy("uniform-int4", min_budget=0.25, needs_scores=False, token_by_token=True)
def uniform_int4(request: TierRequest) -> Tensor:
    """Return INT4 for every token, whatever the probe says: a request that names this policy means it."""
    return _uniform(request, Tier.INT4)


@policy("random", min_budget=0.25, needs_scores=False)
def random(request: TierRequest) -> Tensor:
    """Return Greedy's tiers, placed by chance: the same seed and n give the same tiers."""
    order = from_numpy(np.random.default_rng(request.seed).permutation(request.tokens))
    return fill(order, greedy_counts(request.tier_budget, request.tokens))


@policy("pdtrim", min_budget=0.05, needs_scores=False)
def pdtrim(request: TierRequest) -> Tensor:
    """Return FP16 for the first 4 tokens and the last b · n − 4, and drop the rest.

    PDTrim (arXiv 2509.04467) as the SpectrumKV paper's scripts have it. Where b · n is less than 5, the last token
    comes before the sinks; it is kept whatever it costs. Cost: more than b · n − 1.
    """
    kept = max(1, whole_tokens(request.tier_budget * request.tokens))
    sinks = min(SINK_TOKENS, kept - 1)
    tiers = full((request.tokens,), Tier.DROP, dtype=uint8)
    tiers[:sinks] = Tier.FP16
    tiers[request.tokens - (kept - sinks) :] = Tier.FP16
    return tiers


@policy("sws", min_budget=0.05)
def sws(request: TierRequest) -> TierRanks:
    """Return FP16 for the b · n tokens of the highest scores, and drop the rest (SWS, the paper's baseline).

    One token is kept at least, whatever it costs. Cost: more than b · n − 1.
    """
    kept = max(1, whole_tokens(request.tier_budget * request.tokens))
    return by_rank(request.tokens, {Tier.FP16: kept})


def _uniform(request: TierRequest, tier: Tier) -> Tensor:
    return full((request.tokens,), tier, dtype=uint8)
