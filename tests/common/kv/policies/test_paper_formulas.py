"""The paper's formulas, in exact arithmetic, over a grid of budgets and prompt lengths."""

import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.bench.methods.method import mean_tier_cost
from spectrumkv.common.kv.policies import TierRequest, policies
from spectrumkv.common.kv.tiers import Tier, count_tiers
from tests.common.kv.policies.test_policy import SCORES, request, scores_of_prompts, spell

GRID_TOKENS = [*range(1, 42), 100, 257, 1000, 1792, 131072]
GRID_PERCENT = range(5, 101)


def greedy_by_the_paper(b: Fraction, n: int) -> Counter[Tier]:
    """Real numbers of tokens at each tier, the higher tier rounded down."""
    higher, lower = (Tier.FP16, Tier.INT8) if b >= Fraction(1, 2) else (Tier.INT8, Tier.INT4)
    share = 2 * b - 1 if b >= Fraction(1, 2) else 4 * b - 1
    assert share + (2 - 2 * b if b >= Fraction(1, 2) else 2 - 4 * b) == 1
    return Counter({higher: math.floor(share * n), lower: n - math.floor(share * n)})


def sink_protect_by_the_paper(b: Fraction, n: int) -> Counter[Tier]:
    if n <= 4:
        return Counter({Tier.FP16: n})
    left = max(Fraction(1, 4), (b * n - 4) / (n - 4))
    return Counter({Tier.FP16: 4}) + greedy_by_the_paper(left, n - 4)


def balanced_by_the_paper(b: Fraction, n: int) -> Counter[Tier]:
    fp16 = math.floor((b - Fraction(3, 8)) / Fraction(5, 8) * n)
    return Counter({Tier.FP16: fp16, Tier.INT8: (n - fp16) // 2, Tier.INT4: n - fp16 - (n - fp16) // 2})


def two_tiers_by_the_paper(b: Fraction, n: int) -> Counter[Tier]:
    if b >= Fraction(1, 2):
        return greedy_by_the_paper(b, n)
    int8 = max(1, math.floor(2 * b * n))
    return Counter({Tier.INT8: int8, Tier.DROP: n - int8})


@pytest.mark.parametrize("tokens", GRID_TOKENS)
@pytest.mark.parametrize(
    ("name", "by_the_paper", "int4_allowed"),
    [
        ("greedy", greedy_by_the_paper, True),
        ("random", greedy_by_the_paper, True),
        ("sink-protect", sink_protect_by_the_paper, True),
        ("balanced", balanced_by_the_paper, True),
        ("adaptive", two_tiers_by_the_paper, False),
    ],
)
def test_counts_and_mean_tier_cost_follow_the_papers_formulas(name, by_the_paper, int4_allowed, tokens):
    scores = torch.zeros(tokens)
    # Ranking 131072 tokens at every budget would take as long as all other tests here.
    for percent in GRID_PERCENT if tokens <= 2000 else (30, 38, 55, 70):
        if percent / 100 < policies.get(name).min_budget:
            continue
        tiers = policies.get(name).assign(TierRequest(scores, percent / 100, int4_allowed, seed=1))
        expected = by_the_paper(Fraction(percent, 100), tokens)
        assert +Counter(count_tiers(tiers)) == +expected, percent
        cost = sum(Fraction(tier.nominal_cost) * count for tier, count in expected.items()) / tokens
        assert mean_tier_cost(count_tiers(tiers)) == pytest.approx(float(cost), abs=1e-12)


@pytest.mark.parametrize("percent", range(25, 101))
def test_greedy_costs_exactly_the_budget_where_shares_are_whole(percent):
    tiers = policies.get("greedy").assign(request([0.0] * 100, percent / 100))
    assert mean_tier_cost(count_tiers(tiers)) == pytest.approx(percent / 100, abs=1e-12)


@given(scores_of_prompts, st.booleans())
def test_greedy_at_one_half_is_exactly_uniform_int8(scores, int4_allowed):
    for name in ("greedy", "random", "adaptive"):
        assert spell(name, scores, 0.5, int4_allowed) == "8" * len(scores)


def test_balanced_at_one_half_is_the_papers_20_40_40():
    counts = count_tiers(policies.get("balanced").assign(request([0.0] * 1000, 0.5)))
    assert (counts[Tier.FP16], counts[Tier.INT8], counts[Tier.INT4]) == (200, 400, 400)


def test_sink_protect_over_a_tight_budget_reports_what_it_costs():
    tiers = policies.get("sink-protect").assign(request(SCORES, 0.25))
    assert mean_tier_cost(count_tiers(tiers)) == (4 + 6 / 4) / 10


def test_random_places_greedys_counts_differently_for_each_seed():
    spelled = {spell("random", SCORES * 3, 0.3, seed=seed) for seed in range(8)}
    assert len(spelled) > 1
    assert {"".join(sorted(one)) for one in spelled} == {"4" * 24 + "8" * 6}
