"""What policies refuse: scores, seeds, names, ranges and tables that do not fit."""

import math

import pytest
import torch

from spectrumkv.common.errors import InvalidArgumentError, NotFiniteError
from spectrumkv.common.kv.budget import BYTE_POLICIES, BudgetKind
from spectrumkv.common.kv.policies import Policy, TierRequest, policies
from spectrumkv.common.kv.policies.base import policy
from tests.common.kv.policies.test_policy import SCORES, request


@pytest.mark.parametrize(
    ("scores", "complaint"),
    [
        (torch.zeros(0), "at least 1"),
        (torch.zeros(2, 3), r"\[2, 3\]"),
        (torch.zeros(3, dtype=torch.float64), "torch.float64"),
    ],
)
def test_scores_that_cannot_be_ranked_are_refused(scores, complaint):
    with pytest.raises(InvalidArgumentError, match=complaint):
        TierRequest(scores, 0.5, int4_allowed=True, seed=0)


@pytest.mark.parametrize(
    ("scores", "complaint"),
    [
        (torch.tensor([0.0, math.nan]), "score of token 1 is nan"),
        (torch.tensor([-math.inf, 0.0]), "score of token 0 is -inf"),
    ],
)
def test_scores_that_are_no_numbers_are_the_models_fault(scores, complaint):
    with pytest.raises(NotFiniteError, match=complaint):
        TierRequest(scores, 0.5, int4_allowed=True, seed=0)


def test_a_negative_seed_is_refused():
    with pytest.raises(InvalidArgumentError, match="seed is -1"):
        request(SCORES, 0.5, seed=-1)


def test_an_unknown_policy_is_refused_with_the_valid_names():
    with pytest.raises(InvalidArgumentError, match=r"unknown policy 'thrifty'; allowed: .*greedy.*sws"):
        policies.get("thrifty")


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="policy 'greedy' is registered twice"):
        policy("greedy", min_budget=0.25)(lambda asked: asked.scores)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (0.5, 1.5), (0.8, 0.2)])
def test_a_policy_with_an_impossible_range_is_refused(ends):
    with pytest.raises(ValueError, match="not in"):
        Policy("odd", *ends, codec=None, needs_scores=False, rule=lambda asked: asked.scores)


def test_a_policy_without_a_rule_must_be_in_the_table_that_command_lines_read():
    with pytest.raises(ValueError, match=r"listed in common/kv/budget\.py"):
        Policy("odd", 0.1, 1.0, codec="absmax", needs_scores=True, rule=None)
    with pytest.raises(ValueError, match=r"listed in common/kv/budget\.py"):
        Policy("spectral", 0.1, 1.0, codec="spectral", needs_scores=True, rule=lambda asked: asked.scores)


def test_the_registry_has_the_policies_of_that_table():
    in_bytes = [name for name in policies if policies.get(name).budget_kind is BudgetKind.BYTES]
    assert in_bytes == [one.name for one in BYTE_POLICIES]
    for one in BYTE_POLICIES:
        assert policies.get(one.name).rule is None
        assert policies.get(one.name).min_budget == one.min_budget
