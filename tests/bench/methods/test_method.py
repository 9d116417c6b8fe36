"""The mean tier cost is the paper's normalized budget, as it came out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.bench.methods.method import mean_tier_cost
from spectrumkv.common.kv.tiers import Tier, count_tiers


def as_tensor(tiers: list[Tier]) -> torch.Tensor:
    return torch.tensor(tiers, dtype=torch.uint8)


@given(st.lists(st.sampled_from(Tier), min_size=1, max_size=70))
def test_mean_tier_cost_is_that_of_the_tokens(tiers):
    mean = sum(tier.nominal_cost for tier in tiers) / len(tiers)
    assert mean_tier_cost(count_tiers(as_tensor(tiers))) == pytest.approx(mean, abs=1e-12)


def test_mean_tier_cost_of_several_layers_is_their_mean():
    assert mean_tier_cost(count_tiers(as_tensor([Tier.FP16, Tier.DROP, Tier.INT8, Tier.INT4]).view(2, 2))) == 0.4375
    assert mean_tier_cost(dict.fromkeys(Tier, 0)) == 0
