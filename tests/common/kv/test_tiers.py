import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.common.kv.tiers import (
    Tier,
    count_tiers,
    pack_tier_map,
    tier_map_bytes,
    unpack_tier_map,
)
from spectrumkv.v1 import kv_pb2

tier_maps = st.lists(st.integers(0, 3), max_size=70).map(lambda tiers: torch.tensor(tiers, dtype=torch.uint8))
all_tiers = st.lists(st.sampled_from(Tier), min_size=1, max_size=70)


def as_tensor(tiers: list[Tier]) -> torch.Tensor:
    return torch.tensor(tiers, dtype=torch.uint8)


def test_codes_and_labels_are_those_of_the_wire_and_the_metrics():
    assert [(int(tier), tier.label) for tier in Tier] == [
        (0, "drop"),
        (1, "int4"),
        (2, "int8"),
        (3, "fp16"),
        (4, "native"),
    ]


def test_every_tier_has_a_message_value_one_above_its_code():
    assert {tier.wire_name: tier + 1 for tier in Tier} | {"TIER_UNSPECIFIED": 0} == dict(kv_pb2.Tier.items())


def test_nominal_costs_are_the_papers():
    assert [tier.nominal_cost for tier in Tier] == [0.0, 0.25, 0.5, 1.0, 1.0]


@given(all_tiers)
def test_counts_are_exact_and_name_every_tier(tiers):
    assert count_tiers(as_tensor(tiers)) == {tier: tiers.count(tier) for tier in Tier}


@pytest.mark.parametrize(
    ("tiers", "packed"),
    [
        ([], b""),
        ([3], b"\x03\x00"),
        ([0, 1, 2, 3], b"\xe4\x00"),
        ([3, 2, 1, 0, 1], b"\x1b\x01"),
        ([3] * 8, b"\xff\xff"),
        ([0] * 8 + [2], b"\x00\x00\x02\x00"),
    ],
)
def test_packed_bytes_on_worked_examples(tiers, packed):
    assert pack_tier_map(torch.tensor(tiers, dtype=torch.uint8)) == packed


@given(tier_maps)
def test_unpacking_gives_back_what_was_packed(tiers):
    packed = pack_tier_map(tiers)
    assert len(packed) == tier_map_bytes(tiers.numel())
    assert len(packed) % 2 == 0
    received = torch.tensor(list(packed), dtype=torch.uint8)
    assert torch.equal(unpack_tier_map(received, tiers.numel()), tiers)


@given(tier_maps)
def test_unused_bits_are_zero(tiers):
    as_number = int.from_bytes(pack_tier_map(tiers), "little")
    assert as_number >> (2 * tiers.numel()) == 0


def test_packing_takes_strided_tiers():
    assert pack_tier_map(torch.tensor([1, 0, 2, 0, 3, 0], dtype=torch.uint8)[::2]) == b"\x39\x00"
