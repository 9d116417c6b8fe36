"""Rows in another order, centred, without rotation, and back, against plain torch."""

import numpy as np
import pytest
import torch

from spectrumkv.kernels import spectral_rows as rows
from spectrumkv.kernels.strided import flat

SHAPES = [(1, 1, 2), (3, 7, 64), (2, 33, 80)]


def as_models_leave_them(heads: int, tokens: int, head_dim: int) -> torch.Tensor:
    """Random states as a model leaves them: token by token, among other heads."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, heads + 1, head_dim, generator=generator).transpose(0, 1)[1:]


def some_of(tokens: int) -> np.ndarray:
    """Two thirds of the tokens, in a random order."""
    return np.random.default_rng(tokens).permutation(tokens)[: -(-2 * tokens // 3)]


@pytest.mark.parametrize(("heads", "tokens", "head_dim"), SHAPES)
def test_keys_are_turned_back_like_complex_numbers(heads: int, tokens: int, head_dim: int) -> None:
    states, order, half = as_models_leave_them(heads, tokens, head_dim), some_of(tokens), head_dim // 2
    angle = torch.rand(tokens, half) * 6
    cosine, sine, mean = angle.cos().numpy(), angle.sin().numpy(), torch.randn(heads, head_dim)
    gathered = torch.full((heads, len(order), head_dim), torch.nan)
    rows.gather_unrotated(*flat(states), order, cosine, sine, np.float32(1.5), mean.numpy(), gathered.numpy())
    turned = torch.complex(states[..., :half], states[..., half:]) * torch.polar(torch.ones_like(angle), -angle)
    wanted = torch.cat([turned.real, turned.imag], dim=-1)[:, order] * 1.5 - mean[:, None]
    torch.testing.assert_close(gathered, wanted, atol=1e-5, rtol=1e-5)

    back = torch.full((tokens, heads, head_dim), torch.nan).transpose(0, 1)
    rows.scatter_rotated(gathered.numpy(), order, cosine, sine, np.float32(1 / 1.5), mean.numpy(), *flat(back))
    torch.testing.assert_close(back[:, order], states[:, order], atol=1e-5, rtol=1e-5)
    assert int(back.isnan().sum()) == heads * (tokens - len(order)) * head_dim


@pytest.mark.parametrize(("heads", "tokens", "head_dim"), SHAPES)
def test_values_are_gathered_and_scattered(heads: int, tokens: int, head_dim: int) -> None:
    states, order, mean = as_models_leave_them(heads, tokens, head_dim), some_of(tokens), torch.randn(heads, head_dim)
    gathered = torch.full((heads, len(order), head_dim), torch.nan)
    rows.gather(*flat(states), order, mean.numpy(), gathered.numpy())
    assert torch.equal(gathered, states[:, order] - mean[:, None])
    back = torch.full((heads, 2 * tokens, head_dim), torch.nan)[:, 1 : tokens + 1]
    rows.scatter(gathered.numpy(), order, mean.numpy(), *flat(back))
    assert torch.equal(back[:, order], gathered + mean[:, None])
    assert int(back.isnan().sum()) == heads * (tokens - len(order)) * head_dim
