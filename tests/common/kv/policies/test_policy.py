import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrumkv.bench.methods.method import mean_tier_cost
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.budget import Budget, BudgetKind
from spectrumkv.common.kv.policies import Policy, TierRequest, policies
from spectrumkv.common.kv.policies.ranks import best_first, fill
from spectrumkv.common.kv.tiers import Tier, count_tiers

LETTERS = {Tier.DROP: ".", Tier.INT4: "4", Tier.INT8: "8", Tier.FP16: "F", Tier.NATIVE: "N"}
# A policy without a rule leaves tiers to its codec.
NAMES = tuple(name for name in policies if policies.get(name).budget_kind is BudgetKind.TIER_COST)
# How much of a token's FP16 cost rounding may leave unspent. Policies that are missing here have one precision.
UNSPENT = {
    "greedy": 0.5,
    "random": 0.5,
    "adaptive": 0.5,
    "balanced": 0.75,
    "sink-protect": 0.5,
    "sws": 1.0,
    "pdtrim": 1.0,
}
# The best token first, then better and better towards the end: 0 9 8 7 6 5 4 3 2 1 by rank.
SCORES = [9.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


def request(scores: list[float], budget: float, int4_allowed: bool = True, seed: int = 0) -> TierRequest:
    return TierRequest(torch.tensor(scores, dtype=torch.float32), budget, int4_allowed, seed)


def spell(name: str, scores: list[float], budget: float, int4_allowed: bool = True, seed: int = 0) -> str:
    """The policy's tiers, one letter a token."""
    tiers = policies.get(name).assign(request(scores, budget, int4_allowed, seed))
    return "".join(LETTERS[Tier(tier)] for tier in tiers.tolist())


def budgets(name: str) -> st.SearchStrategy[float]:
    chosen = policies.get(name)
    hundredths = st.integers(math.ceil(chosen.min_budget * 100), math.floor(chosen.max_budget * 100))
    return st.floats(chosen.min_budget, chosen.max_budget) | hundredths.map(lambda percent: percent / 100)


scores_of_prompts = st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=60)

# fmt: off
WORKED = [
    # policy, scores, budget, int4_allowed, tiers
    ("native",       SCORES,     1.0,   True,  "NNNNNNNNNN"),
    ("fp16",         SCORES,     1.0,   True,  "FFFFFFFFFF"),
    ("uniform-int8", SCORES,     0.5,   True,  "8888888888"),
    ("uniform-int8", SCORES,     0.9,   False, "8888888888"),
    ("uniform-int4", SCORES,     0.25,  True,  "4444444444"),
    ("uniform-int4", SCORES,     1.0,   False, "4444444444"),
    ("greedy",       SCORES,     0.25,  True,  "4444444444"),
    ("greedy",       SCORES,     0.3,   True,  "8444444448"),
    ("greedy",       SCORES,     0.33,  True,  "8444444488"),
    ("greedy",       SCORES,     0.4,   False, "8444488888"),
    ("greedy",       SCORES,     0.5,   True,  "8888888888"),
    ("greedy",       SCORES,     0.54,  True,  "8888888888"),
    ("greedy",       SCORES,     0.55,  True,  "F888888888"),
    ("greedy",       SCORES,     0.75,  True,  "F88888FFFF"),
    ("greedy",       SCORES,     1.0,   True,  "FFFFFFFFFF"),
    ("greedy",       [0.0] * 10, 0.3,   True,  "4444444488"),
    ("sink-protect", SCORES,     0.25,  True,  "FFFF444444"),
    ("sink-protect", SCORES,     0.5,   True,  "FFFF444444"),
    ("sink-protect", SCORES,     0.6,   True,  "FFFF444488"),
    ("sink-protect", SCORES,     0.7,   True,  "FFFF888888"),
    ("sink-protect", SCORES,     0.85,  True,  "FFFF888FFF"),
    ("sink-protect", SCORES,     1.0,   True,  "FFFFFFFFFF"),
    ("sink-protect", [1.0] * 3,  0.25,  True,  "FFF"),
    ("sink-protect", [1.0] * 4,  0.5,   True,  "FFFF"),
    ("sink-protect", [1.0] * 5,  0.5,   True,  "FFFF4"),
    # (20 · .5 − 4) / 16 = .375: half of the 16 others at INT8. Tokens 6 and 16 tie for the last place.
    ("sink-protect", SCORES * 2, 0.5,   True,  "FFFF4448888444448888"),
    ("balanced",     SCORES,     0.375, True,  "8444448888"),
    ("balanced",     SCORES,     0.45,  True,  "F444448888"),
    ("balanced",     SCORES,     0.5,   True,  "F44448888F"),
    ("balanced",     SCORES,     0.625, True,  "F444888FFF"),
    ("balanced",     SCORES,     1.0,   True,  "FFFFFFFFFF"),
    ("adaptive",     SCORES,     0.05,  True,  "4........4"),
    ("adaptive",     SCORES,     0.2,   True,  "4..4444444"),
    ("adaptive",     SCORES,     0.3,   True,  "8444444448"),
    ("adaptive",     SCORES,     0.75,  True,  "F88888FFFF"),
    ("adaptive",     SCORES,     0.05,  False, "8........."),
    ("adaptive",     SCORES,     0.3,   False, "8....88888"),
    ("adaptive",     SCORES,     0.5,   False, "8888888888"),
    ("adaptive",     SCORES,     0.75,  False, "F88888FFFF"),
    ("adaptive",     [2.0, 1.0], 0.05,  False, "8."),
    ("adaptive",     [2.0, 2.0], 0.05,  True,  ".4"),
    ("pdtrim",       SCORES,     0.05,  True,  ".........F"),
    ("pdtrim",       SCORES,     0.3,   True,  "FF.......F"),
    ("pdtrim",       SCORES,     0.5,   True,  "FFFF.....F"),
    ("pdtrim",       SCORES,     0.7,   True,  "FFFF...FFF"),
    ("pdtrim",       SCORES,     1.0,   True,  "FFFFFFFFFF"),
    ("sws",          SCORES,     0.05,  True,  "F........."),
    ("sws",          SCORES,     0.3,   True,  "F.......FF"),
    ("sws",          SCORES,     0.5,   True,  "F.....FFFF"),
    ("sws",          [1.0] * 5,  0.4,   True,  "...FF"),
    ("sws",          SCORES,     1.0,   True,  "FFFFFFFFFF"),
]
# fmt: on


@pytest.mark.parametrize(("name", "scores", "budget", "int4_allowed", "tiers"), WORKED)
def test_tier_of_every_token_on_worked_examples(name, scores, budget, int4_allowed, tiers):
    assert spell(name, scores, budget, int4_allowed) == tiers


def test_the_policies_are_those_of_the_interface_and_have_worked_examples():
    expected = {"native", "fp16", "uniform-int8", "uniform-int4", "greedy", "sink-protect", "balanced", "adaptive"}
    expected |= {"random", "pdtrim", "sws"}
    assert set(NAMES) == expected
    assert {name for name, *_ in WORKED} == expected - {"random"}


def test_only_native_forces_a_codec():
    assert {name: policies.get(name).codec for name in NAMES if policies.get(name).codec} == {"native": "native"}


# Every policy, whatever it does.


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(scores=scores_of_prompts, int4_allowed=st.booleans(), seed=st.integers(0, 2**64 - 1), data=st.data())
def test_every_policy_gives_each_token_a_known_tier_and_keeps_one(name, scores, int4_allowed, seed, data):
    asked = request(scores, data.draw(budgets(name)), int4_allowed, seed)
    tiers = policies.get(name).assign(asked)
    assert (tiers.dtype, tiers.device.type, tuple(tiers.shape)) == (torch.uint8, "cpu", (len(scores),))
    assert sum(count_tiers(tiers).values()) == len(scores)
    assert (tiers != Tier.DROP).any()
    assert torch.equal(tiers, policies.get(name).assign(asked))
    assert asked.scores.tolist() == scores


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(scores=scores_of_prompts, int4_allowed=st.booleans(), data=st.data())
def test_no_policy_spends_more_than_its_budget_nor_leaves_a_token_unspent(name, scores, int4_allowed, data):
    budget = data.draw(budgets(name))
    tiers = policies.get(name).assign(request(scores, budget, int4_allowed))
    spent, tokens = mean_tier_cost(count_tiers(tiers)), len(scores)
    if name == "sink-protect" and budget * tokens - 4 < 0.25 * (tokens - 4):
        # The budget does not cover the sinks, so the rest is as cheap as it can be.
        assert spent == (min(4, tokens) + 0.25 * max(0, tokens - 4)) / tokens
        return
    if int((tiers != Tier.DROP).sum()) > 1:
        assert spent <= budget + 1e-9
    if name in UNSPENT:
        assert spent > budget - UNSPENT[name] / tokens - 1e-9
    else:
        assert spent == policies.get(name).min_budget


@pytest.mark.parametrize("name", [name for name in NAMES if policies.get(name).needs_scores])
@settings(max_examples=60)
@given(scores=scores_of_prompts, rise=st.floats(0, 8), int4_allowed=st.booleans(), data=st.data())
def test_raising_a_score_never_lowers_the_tier(name, scores, rise, int4_allowed, data):
    budget = data.draw(budgets(name))
    token = data.draw(st.integers(0, len(scores) - 1))
    raised = [*scores[:token], scores[token] + rise, *scores[token + 1 :]]
    before, after = (policies.get(name).assign(request(one, budget, int4_allowed)) for one in (scores, raised))
    assert after[token] >= before[token]


@pytest.mark.parametrize("name", [name for name in NAMES if not policies.get(name).needs_scores])
@given(scores=scores_of_prompts, data=st.data())
def test_policies_that_say_so_do_not_look_at_scores(name, scores, data):
    budget = data.draw(budgets(name))
    assert spell(name, scores, budget) == spell(name, [0.0] * len(scores), budget)


@pytest.mark.parametrize("name", [name for name in NAMES if policies.get(name).needs_scores])
def test_policies_that_need_scores_do_look_at_them(name):
    rising, falling = ([float(score) for score in one] for one in (range(20), range(20, 0, -1)))
    assert spell(name, rising, 0.7) != spell(name, falling, 0.7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [0.0, -0.5, 0.0499, 1.0001, 2.0, math.nan, math.inf, -math.inf])
def test_a_budget_that_no_policy_takes_is_refused_by_name(name, budget):
    chosen = policies.get(name)
    for refuse in (
        lambda: chosen.check_budget(budget),
        lambda: chosen.resolve_budget(budget, server_default=0.5),
        lambda: chosen.assign(request(SCORES, budget)),
    ):
        assert_refused(refuse, name, budget, chosen)


@pytest.mark.parametrize("name", NAMES)
def test_the_ends_of_the_range_are_in_it_and_what_lies_beyond_is_not(name):
    chosen = policies.get(name)
    for budget in (chosen.min_budget, chosen.max_budget):
        assert chosen.resolve_budget(budget, server_default=0.6) == Budget(BudgetKind.TIER_COST, budget)
    for budget in (math.nextafter(chosen.min_budget, 0), math.nextafter(chosen.max_budget, 2)):
        assert_refused(lambda budget=budget: chosen.check_budget(budget), name, budget, chosen)


def assert_refused(refuse: Callable[[], object], name: str, budget: float, chosen: Policy) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        refuse()
    for part in (f"'{name}'", str(budget), str(chosen.min_budget), str(chosen.max_budget)):
        assert part in refusal.value.message


@pytest.mark.parametrize("name", NAMES)
@given(server_default=st.floats(0.05, 1))
def test_the_servers_default_is_moved_into_the_range(name, server_default):
    chosen = policies.get(name)
    resolved = chosen.resolve_budget(None, server_default).value
    nearest = min(
        (server_default, chosen.min_budget, chosen.max_budget),
        key=lambda b: (not chosen.min_budget <= b <= chosen.max_budget, abs(b - server_default)),
    )
    assert resolved == nearest


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("native", (1, 1)),
        ("fp16", (1, 1)),
        ("uniform-int8", (0.5, 1)),
        ("uniform-int4", (0.25, 1)),
        ("greedy", (0.25, 1)),
        ("random", (0.25, 1)),
        ("sink-protect", (0.25, 1)),
        ("balanced", (0.375, 1)),
        ("adaptive", (0.05, 1)),
        ("pdtrim", (0.05, 1)),
        ("sws", (0.05, 1)),
    ],
)
def test_ranges(name, ends):
    assert (policies.get(name).min_budget, policies.get(name).max_budget) == ends


# Requests, the registry, and the parts that rules are made of.


@given(scores_of_prompts)
def test_ranking_puts_the_later_of_two_equal_tokens_first(scores):
    expected = sorted(range(len(scores)), key=lambda token: (scores[token], token), reverse=True)
    assert best_first(request(scores, 0.5).scores).tolist() == expected


def test_fill_drops_what_no_tier_claims():
    tiers = fill(torch.tensor([2, 0, 3, 1]), {Tier.FP16: 1, Tier.INT4: 2})
    assert tiers.tolist() == [Tier.INT4, Tier.DROP, Tier.FP16, Tier.INT4]
