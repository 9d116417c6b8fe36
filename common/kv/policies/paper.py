"""The policies of the SpectrumKV paper (arXiv 2606.08635, Method).

n is the number of tokens and b the tier budget. Numbers of tokens are rounded so that the tiers' cost never exceeds
b · n, and each docstring says by how much it can fall short of that.
"""

from spectrumkv.common.kv.policies.base import TierRequest, policy, whole_tokens
from spectrumkv.common.kv.policies.ranks import by_rank
from spectrumkv.common.kv.scoring import SINK_TOKENS
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.kernels.tier_placement import TierRanks


def greedy_counts(tier_budget: float, tokens: int) -> dict[Tier, int]:
    """Return how many of `tokens` tokens Greedy gives each tier, highest tier first.

    Args:
        tier_budget: from .25 to 1.
        tokens: 0 or more.
    """
    if tier_budget >= 0.5:
        fp16 = whole_tokens((2 * tier_budget - 1) * tokens)
        return {Tier.FP16: fp16, Tier.INT8: tokens - fp16}
    int8 = whole_tokens((4 * tier_budget - 1) * tokens)
    return {Tier.INT8: int8, Tier.INT4: tokens - int8}


@policy("greedy", min_budget=0.25)
def greedy(request: TierRequest) -> TierRanks:
    """Return one tier more for the best tokens than for the rest.

    .25 ≤ b ≤ .5: INT8 for 4b − 1 of them, INT4 for 2 − 4b. .5 ≤ b ≤ 1: FP16 for 2b − 1, INT8 for 2 − 2b. So b = .5
    is uniform INT8. Cost: more than b · n − ½.
    """
    return by_rank(request.tokens, greedy_counts(request.tier_budget, request.tokens))


@policy("sink-protect", min_budget=0.25)
def sink_protect(request: TierRequest) -> TierRanks:
    """Return FP16 for the first 4 tokens, and Greedy's tiers for the rest with (b · n − 4) / (n − 4) each.

    Where that is less than .25, the rest is all INT4. Then, and where n ≤ 4, the cost exceeds b · n, and
    reports say so. Otherwise the cost is more than b · n − ½, as Greedy's.
    """
    sinks = min(SINK_TOKENS, request.tokens)
    others = request.tokens - sinks
    left = max(0.25, (request.tier_budget * request.tokens - sinks) / others) if others else 1.0
    return by_rank(request.tokens, greedy_counts(left, others), sinks)


@policy("balanced", min_budget=0.375)
def balanced(request: TierRequest) -> TierRanks:
    """Return FP16 for (b − .375) / .625 of the tokens, INT8 for half of the others, and INT4 for the rest.

    At b = .5 these are the paper's 20, 40 and 40 %. The paper gives no other budget: keeping INT8 and INT4 alike
    is our generalization, and .375 is the cost where nothing is left for FP16. An odd token out gets INT4. Cost:
    more than b · n − ¾.
    """
    fp16 = whole_tokens((request.tier_budget - 0.375) / 0.625 * request.tokens)
    int8 = (request.tokens - fp16) // 2
    return by_rank(request.tokens, {Tier.FP16: fp16, Tier.INT8: int8, Tier.INT4: request.tokens - fp16 - int8})


@policy("adaptive", min_budget=0.05, heeds_int4=True)
def adaptive(request: TierRequest) -> TierRanks:
    """Return Greedy's tiers where the probe allows INT4, otherwise FP16 and INT8 only.

    Where some layers do without INT4, they are sent at INT8 and the others pay for it (`Int4Layers.layer_budget`).
    Without INT4 the two agree for b ≥ .5, and below it 2b of the tokens get INT8 and the rest is dropped. The paper
    ends at .25 with INT4; below it we go on alike: 4b of the tokens get INT4 and the rest is dropped. One token is
    kept at least, whatever it costs. Cost: more than b · n − ½.
    """
    tier_budget, tokens = request.tier_budget, request.tokens
    if tier_budget >= (0.25 if request.int4_allowed else 0.5):
        return greedy(request)
    tier = Tier.INT4 if request.int4_allowed else Tier.INT8
    kept = max(1, whole_tokens(tier_budget / tier.nominal_cost * tokens))
    return by_rank(tokens, {tier: kept})
