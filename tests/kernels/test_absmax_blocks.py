"""Bodies of blocks: tokens of every tier, one after another."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.kernels import absmax, absmax_by_tier, absmax_cpu, absmax_reference
from tests.kernels.absmax_states import DTYPES, LAYOUTS, random_states, strided


def row_bytes(tier: int, head_dim: int) -> int:
    """What one token of one KV head takes of a body, on one side."""
    return (0, 2 + head_dim // 2, 2 + head_dim, 2 * head_dim)[tier]


@given(
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([2, 6, 64, 80]),
    tiers=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    address=st.integers(0, 1),
)
def test_blocks_on_a_cpu_equal_blocks_coded_tier_by_tier(
    dtype: torch.dtype, layout: str, kv_heads: int, head_dim: int, tiers: list[int], address: int
) -> None:
    shape = (kv_heads, len(tiers), head_dim)
    given_tiers = torch.tensor(tiers, dtype=torch.uint8)
    size = 2 * kv_heads * sum(row_bytes(tier, head_dim) for tier in tiers)
    pair = [random_states(*shape, dtype, seed).cpu() for seed in (0, 1)]
    body, expected = (torch.full((size,), 0x5A, dtype=torch.uint8) for _ in range(2))
    absmax_by_tier.encode(absmax_reference.quantize, *pair, given_tiers, expected)
    sources = [strided(shape, dtype, layout).cpu().copy_(states) for states in pair]
    absmax_cpu.encode(*sources, given_tiers, body)
    assert torch.equal(body, expected)
    # Bodies arrive at odd addresses as well.
    arrived = torch.empty(size + address, dtype=torch.uint8)[address:].copy_(body)
    restored = [strided(shape, dtype, layout).cpu() for _ in pair]
    absmax_cpu.decode(arrived, given_tiers, *restored)
    wanted = [torch.full(shape, torch.nan, dtype=dtype) for _ in pair]
    absmax_by_tier.decode(absmax_reference.dequantize, expected, given_tiers, *wanted)
    for actual, states in zip(restored, wanted, strict=True):
        assert torch.equal(actual.nan_to_num(7e4), states.nan_to_num(7e4))
        assert actual[:, given_tiers == 0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("poison", [torch.nan, -torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_is_found(dtype: torch.dtype, poison: float) -> None:
    finite = torch.finfo(dtype).max * torch.randint(-1, 2, (67,)).to(dtype)
    data = finite.view(torch.uint8)
    assert absmax.is_finite(data, dtype)
    finite[66] = poison
    assert not absmax.is_finite(data, dtype)
    assert absmax.is_finite(data[:0], dtype)
