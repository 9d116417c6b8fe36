"""Bounds and masks of attention logits, against what they are defined as."""

import math

import pytest
import torch

from spectrumkv.kernels.logits import causal_mask, soft_cap


@pytest.mark.parametrize("scaling", [1.0, 0.125])
def test_logits_stay_within_the_cap_and_small_ones_as_they_are(scaling: float) -> None:
    logits = torch.tensor([0.0, 0.01, -3.0, 40.0, -1e9, math.inf])
    capped = soft_cap(logits, 5.0, scaling=scaling)
    assert capped.tolist() == pytest.approx([5 * math.tanh(scaling * x / 5) for x in logits.tolist()], rel=1e-6)
    assert soft_cap(torch.tensor([math.nan]), 5.0).isnan().all()


def test_a_cap_is_applied_in_place_or_to_what_has_gradients() -> None:
    logits = torch.randn(7, generator=torch.Generator().manual_seed(0)).mul(9).requires_grad_()
    capped = soft_cap(logits, 5.0)
    capped.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, 1 - (capped.detach() / 5) ** 2)
    in_place = logits.detach().clone()
    assert soft_cap(in_place, 5.0, out=in_place) is in_place
    assert torch.equal(in_place, capped.detach())


@pytest.mark.parametrize("sliding_window", [None, 1, 3, 50])
@pytest.mark.parametrize(("first", "end", "tokens"), [(0, 1, 1), (0, 9, 9), (5, 9, 9), (2, 5, 9), (8, 9, 9)])
def test_queries_see_themselves_and_what_came_before(
    first: int, end: int, tokens: int, sliding_window: int | None
) -> None:
    seen = causal_mask(range(first, end), tokens, sliding_window, torch.device("cpu"))
    wanted = [[0 <= at - token < (sliding_window or tokens) for token in range(tokens)] for at in range(first, end)]
    assert seen.tolist() == wanted
