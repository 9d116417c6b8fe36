"""What a plan says of itself before anything is coded."""

import pytest
import torch

from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.plan import CodingPlan
from spectrumkv.common.kv.policies import policies

GEOMETRY = KvGeometry(layers=4, kv_heads=1, head_dim=4, native_dtype=torch.float32)
TOKENS = 40


def plan(policy: str, budget: float, int4: Int4Layers = Int4Layers(), scope: str = "layer") -> CodingPlan:  # noqa: B008
    chosen = policies.get(policy)
    codec = codecs.get(chosen.codec or "absmax")
    return CodingPlan(chosen, chosen.budget(budget), "attention", codec, scope, int4, seed=0)


@pytest.mark.parametrize(
    ("policy", "budget", "int4", "scope", "drops"),
    [
        ("native", 1.0, Int4Layers(), "layer", False),
        ("spectral", 0.05, Int4Layers(), "layer", False),
        ("greedy", 0.25, Int4Layers(), "layer", False),
        ("adaptive", 0.25, Int4Layers(), "layer", False),
        ("adaptive", 0.2, Int4Layers(), "layer", True),
        # One layer at INT8 is paid for by the others; four of four are not.
        ("adaptive", 0.35, Int4Layers(frozenset({1})), "layer", False),
        ("adaptive", 0.35, Int4Layers(frozenset({1})), "model", True),
        ("adaptive", 0.35, Int4Layers(frozenset(range(4))), "layer", True),
        ("pdtrim", 0.9, Int4Layers(), "layer", True),
        ("sws", 0.9, Int4Layers(), "layer", True),
        ("sws", 1.0, Int4Layers(), "layer", False),
    ],
)
def test_a_plan_knows_whether_it_drops_tokens(
    policy: str, budget: float, int4: Int4Layers, scope: str, drops: bool
) -> None:
    assert plan(policy, budget, int4, scope).drops_tokens(GEOMETRY, TOKENS) is drops
