"""Copies between states and bodies; Triton runs under its interpreter where there is no GPU."""

from itertools import pairwise

import pytest
import torch

from spectrumkv.kernels.native import triton as native_triton
from tests.kernels.absmax.states import DEVICE, DTYPES, LAYOUTS, random_states, strided


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("layout", "kv_heads", "head_dim", "boundaries"),
    [
        *((layout, 3, 64, [0, 5, 70, 75]) for layout in LAYOUTS),
        ("contiguous", 1, 6, [0, 1]),
        ("slots", 2, 80, [0, 33, 66, 90]),
    ],
)
def test_bodies_are_the_states_and_the_states_come_back(
    dtype: torch.dtype, layout: str, kv_heads: int, head_dim: int, boundaries: list[int]
) -> None:
    shape = (kv_heads, boundaries[-1], head_dim)
    pair = [random_states(*shape, dtype, seed) for seed in (0, 1)]
    sources = [strided(shape, dtype, layout).copy_(states) for states in pair]
    coded = native_triton.encode(*sources, boundaries)
    size = 2 * pair[0].nbytes
    expected = torch.cat(
        [torch.stack([one[:, first:end] for one in pair]).flatten() for first, end in pairwise(boundaries)]
    )
    assert torch.equal(coded.bodies.view(dtype), expected)
    assert not coded.broken.any()
    # Bodies arrive at odd addresses.
    arrived = torch.empty(size + 1, dtype=torch.uint8)[1:].copy_(coded.bodies)
    targets = [strided(shape, dtype, layout) for _ in pair]
    lengths = [end - first for first, end in pairwise(boundaries)]
    bodies = arrived.split([size * length // boundaries[-1] for length in lengths])
    slots = [(targets[0][:, first:end], targets[1][:, first:end]) for first, end in pairwise(boundaries)]
    native_triton.decode(bodies, slots)
    for target, states in zip(targets, pair, strict=True):
        assert torch.equal(target, states)
        if layout == "slots":
            assert target._base is not None
            assert target._base.isfinite().sum() == target.numel(), "a row outside the view was written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [torch.nan, -torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_is_noted(dtype: torch.dtype, poison: float, side: int) -> None:
    pair = torch.full((2, 2, 40, 64), torch.finfo(dtype).max, dtype=dtype, device=DEVICE)
    pair[1] *= -1
    pair[side, 1, 39, 63] = poison
    coded = native_triton.encode(*pair, [0, 40])
    assert coded.broken.sum() == 1
