"""What an encoder factory is given, and what codecs refuse of it."""

import math
from dataclasses import replace

import pytest
import torch

from spectrumkv.common.errors import FailedPreconditionError, InternalError, InvalidArgumentError
from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.budget import Budget, BudgetKind
from spectrumkv.common.kv.codecs import EncoderRequest, codecs
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.policies import policies

GEOMETRY = KvGeometry(layers=3, kv_heads=2, head_dim=16, native_dtype=torch.float32)
IN_BYTES = EncoderRequest(
    policy=policies.get("spectral"),
    budget=Budget(BudgetKind.BYTES, 0.5),
    scorer="attention",
    scope="layer",
    int4=Int4Layers(),
    seed=0,
    geometry=GEOMETRY,
    tokens=100,
    framing_bytes=30,
)
IN_TIERS = replace(IN_BYTES, policy=policies.get("greedy"), budget=Budget(BudgetKind.TIER_COST, 0.5))


def test_a_budget_is_of_its_policys_kind() -> None:
    with pytest.raises(InternalError, match="'spectral' has budgets of kind 'bytes', not 'tier_cost'"):
        replace(IN_BYTES, budget=IN_TIERS.budget)
    with pytest.raises(InternalError, match="'greedy' has budgets of kind 'tier_cost', not 'bytes'"):
        replace(IN_TIERS, budget=IN_BYTES.budget)


@pytest.mark.parametrize("kind", BudgetKind)
@pytest.mark.parametrize("value", [0.0, -0.1, 1.0001, math.inf, math.nan])
def test_a_budget_is_a_share_of_fp16(kind: BudgetKind, value: float) -> None:
    with pytest.raises(InvalidArgumentError, match="above 0 and at most 1"):
        Budget(kind, value)
    assert Budget(kind, 1.0).value == 1.0


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="seed is -1"):
        replace(IN_BYTES, seed=-1)


def test_a_byte_budget_pays_for_framing() -> None:
    assert IN_BYTES.segment_bytes == GEOMETRY.fp16_bytes(100) // 2 - 30
    with pytest.raises(InternalError, match="'greedy' does not count bytes"):
        _ = IN_TIERS.segment_bytes


def test_policies_whose_budget_counts_bytes_belong_to_a_codec() -> None:
    for policy in map(policies.get, policies):
        if policy.budget_kind is BudgetKind.BYTES:
            assert policy.codec in codecs


def test_an_allocation_that_needs_a_basis_is_refused_without_one() -> None:
    for name in ("spectral", "absmax"):
        with pytest.raises(FailedPreconditionError, match="codec 'spectral' needs a basis"):
            codecs.get(name).encoder(IN_BYTES)
    with pytest.raises(FailedPreconditionError, match="codec 'spectral' needs a basis"):
        codecs.get("spectral").decoder(GEOMETRY, None)
    with pytest.raises(FailedPreconditionError, match="codec 'spectral' needs a basis"):
        codecs.get("spectral").basis_digest(None)
    assert codecs.get("absmax").basis_digest(None) == b""


def test_a_codec_without_an_allocation_of_its_own_says_so() -> None:
    with pytest.raises(InternalError, match="'absmax' has no bit allocation of its own"):
        codecs.get("absmax").tier_allocation(IN_BYTES, {})
