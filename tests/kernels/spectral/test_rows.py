"""Rows in another order, centred, without rotation, and back, against plain torch."""

import numpy as np
import pytest
import torch

from spectrumkv.kernels.jit.strided import flat
from spectrumkv.kernels.spectral import rows

SHAPES = [(1, 1, 2), (3, 7, 64), (2, 33, 80)]


def as_models_leave_them(heads: int, tokens: int, head_dim: int) -> torch.Tensor:
    """Random states as a model leaves them: token by token, among other heads."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, heads + 1, head_dim, generator=generator).transpose(0, 1)[1:]


def some_of(tokens: int) -> np.ndarray:
    """Two thirds of the tokens, in a random order."""
    return np.random.default_rng(tokens).permutation(tokens)[: -(-2 * tokens // 3)]


def in_pieces(places: int) -> list[tuple[int, int]]:
    """First place and number of places of pieces of five."""
    return [(first, min(5, places - first)) for first in range(0, places, 5)]


@pytest.mark.parametrize(("heads", "tokens", "head_dim"), SHAPES)
def test_keys_are_turned_back_like_complex_numbers(heads: int, tokens: int, head_dim: int) -> None:
    states, order, half = as_models_leave_them(heads, tokens, head_dim), some_of(tokens), head_dim // 2
    angle = torch.rand(tokens, half) * 6
    cosine, sine, mean = angle.cos().numpy(), angle.sin().numpy(), torch.randn(heads, head_dim)
    turned = torch.complex(states[..., :half], states[..., half:]) * torch.polar(torch.ones_like(angle), -angle)
    wanted = torch.cat([turned.real, turned.imag], dim=-1)[:, order] * 1.5 - mean[:, None]
    back = torch.full((tokens, heads, head_dim), torch.nan).transpose(0, 1)
    (memory, head_stride, stride), (back_memory, back_head_stride, back_stride) = flat(states), flat(back)
    for head in range(heads):
        center, gathered = mean[head].numpy(), np.full((5, head_dim + 3), np.nan, np.float32)
        for piece in in_pieces(len(order)):
            start = head * head_stride
            rows.gather_unrotated(
                memory, start, stride, order, *piece, cosine, sine, np.float32(1.5), center, gathered
            )
            taken = slice(piece[0], sum(piece))
            torch.testing.assert_close(
                torch.from_numpy(gathered[: piece[1], :head_dim]), wanted[head, taken], atol=1e-5, rtol=1e-5
            )
            assert np.isnan(gathered[:, head_dim:]).all()
            start, inverse = head * back_head_stride, np.float32(1 / 1.5)
            rows.scatter_rotated(
                gathered, order, *piece, cosine, sine, inverse, center, back_memory, start, back_stride
            )
    torch.testing.assert_close(back[:, order], states[:, order], atol=1e-5, rtol=1e-5)
    assert int(back.isnan().sum()) == heads * (tokens - len(order)) * head_dim


@pytest.mark.parametrize(("heads", "tokens", "head_dim"), SHAPES)
def test_values_are_gathered_and_scattered(heads: int, tokens: int, head_dim: int) -> None:
    states, order, mean = as_models_leave_them(heads, tokens, head_dim), some_of(tokens), torch.randn(heads, head_dim)
    back = torch.full((heads, 2 * tokens, head_dim), torch.nan)[:, 1 : tokens + 1]
    (memory, head_stride, stride), (back_memory, back_head_stride, back_stride) = flat(states), flat(back)
    wanted = states[:, order] - mean[:, None]
    for head in range(heads):
        center, gathered = mean[head].numpy(), np.full((5, head_dim + 3), np.nan, np.float32)
        for piece in in_pieces(len(order)):
            rows.gather(memory, head * head_stride, stride, order, *piece, center, gathered)
            assert (gathered[: piece[1], :head_dim] == wanted[head, piece[0] : sum(piece)].numpy()).all()
            assert np.isnan(gathered[:, head_dim:]).all()
            rows.scatter(gathered, order, *piece, center, back_memory, head * back_head_stride, back_stride)
    assert torch.equal(back[:, order], wanted + mean[:, None])
    assert int(back.isnan().sum()) == heads * (tokens - len(order)) * head_dim
