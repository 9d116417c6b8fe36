import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.allocation import Int4Layers, most_without_int4
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.absmax import AbsmaxCodec
from spectrumkv.common.kv.codecs.encoder_request import EncoderRequest
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.policies import policies
from spectrumkv.common.kv.tiers import Tier, count_tiers

TOKENS = 200


def tier_counts(policy: str, budget: float, int4: Int4Layers, layers: int, scope: str = "layer") -> list[dict]:
    """Tokens at each tier, layer by layer."""
    geometry = KvGeometry(layers, 1, 4, torch.float32)
    chosen = policies.get(policy)
    encoder = AbsmaxCodec().encoder(
        EncoderRequest(chosen, chosen.budget(budget), "attention", scope, int4, 0, geometry, TOKENS)
    )
    generator = torch.Generator().manual_seed(0)
    counts: list[dict] = [{} for _ in range(layers)]
    for layer in range(layers):
        keys, values, queries = torch.randn(3, 1, TOKENS, 4, generator=generator)
        for segment in encoder.encode(LayerCapture(queries[:, -8:], keys, values, 0.5, None, None, layer)):
            counts[segment.layer] = {tier: count for tier, count in count_tiers(segment.tiers).items() if count}
    return counts


def test_which_layers_are_off() -> None:
    some = Int4Layers(frozenset({29, 0}))
    assert [some.allows(layer) for layer in (0, 1, 28, 29)] == [False, True, True, False]
    assert not some.in_all_layers
    assert some.off_list == "0, 29"
    assert Int4Layers().in_all_layers
    assert not any(Int4Layers.in_none(3).allows(layer) for layer in range(3))
    with pytest.raises(InvalidArgumentError, match="layer -1"):
        Int4Layers(frozenset({-1, 2}))


@given(
    layers=st.integers(1, 100),
    percent=st.integers(5, 100),
    off=st.frozensets(st.integers(0, 99), max_size=100),
)
def test_layer_budgets_keep_to_the_mean(layers: int, percent: int, off: frozenset[int]) -> None:
    budget = percent / 100
    off = frozenset(layer for layer in off if layer < layers)
    int4 = Int4Layers(off)
    shares = [int4.layer_budget(layer, budget, layers) for layer in range(layers)]
    assert sum(shares) / layers == pytest.approx(budget)
    if off and budget < 0.5 and len(off) <= most_without_int4(budget, layers):
        assert all(share == 0.5 for layer, share in enumerate(shares) if layer in off)
        assert all(0.25 <= share <= budget for layer, share in enumerate(shares) if layer not in off)
    else:
        assert set(shares) == {budget}


@pytest.mark.parametrize(
    ("budget", "layers", "most"), [(0.3, 30, 6), (0.3, 4, 0), (0.3, 5, 1), (0.25, 80, 0), (0.1, 80, 0), (0.5, 30, 30)]
)
def test_how_many_layers_a_budget_can_pay_int8_for(budget: float, layers: int, most: int) -> None:
    assert most_without_int4(budget, layers) == most


def test_a_layer_without_int4_is_sent_at_int8_and_the_others_pay() -> None:
    first, second, third = tier_counts("adaptive", 0.4, Int4Layers(frozenset({1})), layers=3)
    assert second == {Tier.INT8: TOKENS}
    # (3 · 0.4 − 0.5) / 2 is 0.35, of which Greedy makes 40 % INT8.
    assert first == third == {Tier.INT8: 80, Tier.INT4: 120}


def test_what_the_others_cannot_pay_for_is_dropped() -> None:
    first, second = tier_counts("adaptive", 0.3, Int4Layers(frozenset({1})), layers=2)
    assert first == {Tier.INT8: 40, Tier.INT4: 160}
    assert second == {Tier.INT8: 120, Tier.DROP: 80}


def test_without_int4_anywhere_adaptive_is_the_papers() -> None:
    for counts in tier_counts("adaptive", 0.3, Int4Layers.in_none(2), layers=2):
        assert counts == {Tier.INT8: 120, Tier.DROP: 80}


@pytest.mark.parametrize("policy", ["greedy", "sink-protect", "random", "uniform-int4"])
def test_policies_that_do_not_heed_it_are_what_their_names_say(policy: str) -> None:
    assert tier_counts(policy, 0.4, Int4Layers(frozenset({1})), 3) == tier_counts(policy, 0.4, Int4Layers(), 3)


def test_one_tier_for_all_layers_needs_all_of_them() -> None:
    for counts in tier_counts("adaptive", 0.4, Int4Layers(frozenset({1})), 3, scope="model"):
        assert counts == {Tier.INT8: 160, Tier.DROP: 40}
    for counts in tier_counts("adaptive", 0.4, Int4Layers(), 3, scope="model"):
        assert counts == {Tier.INT8: 120, Tier.INT4: 80}
