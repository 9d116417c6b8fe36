"""Bodies of segments: tokens of every tier, one after another."""

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.kernels import absmax
from spectrumkv.kernels.absmax import cpu as absmax_cpu
from spectrumkv.kernels.absmax import reference as absmax_reference
from spectrumkv.kernels.absmax import triton as absmax_triton
from tests.kernels.absmax.states import DEVICE, DTYPES, LAYOUTS, random_states, strided


def row_bytes(tier: int, head_dim: int) -> int:
    """What one token of one KV head takes of a body, on one side."""
    return (0, 2 + head_dim // 2, 2 + head_dim, 2 * head_dim)[tier]


@given(
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([2, 6, 32, 64, 80, 96]),
    tiers=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    cut=st.integers(0, 40),
    address=st.integers(0, 1),
)
def test_segments_on_a_cpu_equal_those_of_the_reference(
    dtype: torch.dtype, layout: str, kv_heads: int, head_dim: int, tiers: list[int], cut: int, address: int
) -> None:
    assert_segments_agree(absmax_cpu, torch.device("cpu"), dtype, layout, kv_heads, head_dim, tiers, [cut], address)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("layout", "kv_heads", "head_dim", "tokens", "boundaries"),
    [
        *((layout, 3, 64, 37, [5, 20]) for layout in LAYOUTS),
        ("contiguous", 1, 64, 1, []),
        ("slots", 2, 80, 33, [32]),
        ("tokens-first", 5, 6, 45, []),
        ("slots", 1, 256, 19, [8, 9, 10]),
    ],
)
def test_one_launch_in_triton_codes_any_mix_of_tiers(
    dtype: torch.dtype, layout: str, kv_heads: int, head_dim: int, tokens: int, boundaries: list[int]
) -> None:
    tiers = torch.randint(0, 4, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()
    assert_segments_agree(absmax_triton, DEVICE, dtype, layout, kv_heads, head_dim, tiers, boundaries, address=0)


@pytest.mark.parametrize("tier", [0, 1, 2, 3])
def test_one_launch_in_triton_codes_one_tier(tier: int) -> None:
    tiers = [tier] * 37
    assert_segments_agree(absmax_triton, DEVICE, torch.float16, "slots", 2, 64, tiers, [20], address=0)


def assert_segments_agree(
    implementation: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    layout: str,
    kv_heads: int,
    head_dim: int,
    tiers: list[int],
    boundaries: list[int],
    address: int,
) -> None:
    """Code and decode from and to garbage, in segments that begin at these tokens too, as the reference does."""
    shape = (kv_heads, len(tiers), head_dim)
    given_tiers = torch.tensor(tiers, dtype=torch.uint8)
    bounds = [0, *(one for one in boundaries if 0 < one < len(tiers)), len(tiers)]
    size = 2 * kv_heads * sum(row_bytes(tier, head_dim) for tier in tiers)
    pair = [random_states(*shape, dtype, seed).to(device) for seed in (0, 1)]
    bodies, expected = (torch.full((size,), 0x5A, dtype=torch.uint8, device=device) for _ in range(2))
    absmax_reference.encode(*pair, given_tiers, bounds, expected)
    sources = [strided(shape, dtype, layout).to(device).copy_(states) for states in pair]
    implementation.encode(*sources, given_tiers, bounds, bodies)
    assert torch.equal(bodies, expected)
    # Bodies arrive at odd addresses as well.
    arrived = torch.empty(size + address, dtype=torch.uint8, device=device)[address:].copy_(bodies)
    restored = [strided(shape, dtype, layout).to(device) for _ in pair]
    implementation.decode(arrived, given_tiers, bounds, *restored)
    wanted = [torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in pair]
    absmax_reference.decode(expected, given_tiers, bounds, *wanted)
    for actual, states in zip(restored, wanted, strict=True):
        assert torch.equal(actual.nan_to_num(7e4), states.nan_to_num(7e4))
        assert actual[:, given_tiers == 0].isnan().all()
        assert not actual[:, given_tiers != 0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("poison", [torch.nan, -torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_is_found(dtype: torch.dtype, poison: float) -> None:
    finite = torch.finfo(dtype).max * torch.randint(-1, 2, (67,)).to(dtype)
    data = finite.view(torch.uint8)
    assert absmax.halves_are_finite(data, dtype)
    finite[66] = poison
    assert not absmax.halves_are_finite(data, dtype)
    assert absmax.halves_are_finite(data[:0], dtype)
