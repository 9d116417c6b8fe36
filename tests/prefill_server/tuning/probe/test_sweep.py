import pytest
import torch

from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.tiers import Tier, count_tiers
from spectrumkv.prefill_server.tuning.probe.sweep import bisection_steps, fewest_that_pass, int4_trial_without


@pytest.mark.parametrize("most", [1, 2, 3, 6, 7, 8, 29, 32])
def test_bisection_finds_the_fewest_in_as_many_steps_as_announced(most: int) -> None:
    for fewest in range(most + 1):
        asked: list[int] = []

        def passes(count: int, fewest: int = fewest, asked: list[int] = asked) -> bool:
            asked.append(count)
            return count >= fewest

        assert fewest_that_pass(most, passes) == fewest
        assert len(asked) == len(set(asked)) <= bisection_steps(most)
        assert all(0 <= count <= most for count in asked)


def test_where_the_most_does_not_pass_nothing_else_is_tried() -> None:
    asked: list[int] = []
    assert fewest_that_pass(6, lambda count: bool(asked.append(count))) is None
    assert asked == [6]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_trial_without_some_layers_leaves_the_others_as_they_were(count: int) -> None:
    layers, tokens = 3, 100
    geometry = KvGeometry(layers, 1, 4, torch.float32)
    plan = int4_trial_without(codecs.get("absmax"), frozenset(range(count)), layers)
    encoder = plan.encoder(geometry, tokens, framing_bytes=0)
    for layer in range(layers):
        keys, values, queries = torch.randn(3, 1, tokens, 4, generator=torch.Generator().manual_seed(layer))
        [segment] = encoder.encode(LayerCapture(queries[:, -8:], keys, values, 0.5, None, None, layer))
        tiers = {tier: number for tier, number in count_tiers(segment.tiers).items() if number}
        assert tiers == ({Tier.INT8: 100} if layer < count else {Tier.INT8: 20, Tier.INT4: 80})
