"""Moments of coefficients against plain torch in float64."""

import numpy as np
import pytest
import torch

from spectrumkv.common.kv.codecs.spectral.transform import LayerTransform
from spectrumkv.kernels.jit.strided import flat
from spectrumkv.kernels.spectral.moments import add_moments
from spectrumkv.kernels.spectral.transform import TOKENS
from tests.common.kv.codecs.spectral_prompts import basis_of, geometry, plain_coefficients, plain_states


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 6), (3, 64), (2, 80)])
@pytest.mark.parametrize("tokens", [1, 17, TOKENS])
def test_moments_are_sums_over_the_tokens_that_are_asked_for(kv_heads: int, head_dim: int, tokens: int) -> None:
    shape = geometry(kv_heads, head_dim, layers=1)
    basis, generator = basis_of(shape), torch.Generator().manual_seed(tokens)
    coefficients = torch.randn(2, kv_heads, 3 * tokens, head_dim, generator=generator) * basis.std[0][:, :, None]
    keys, values = plain_states(basis, 0, coefficients, 0).float().transpose(1, 2).contiguous().transpose(1, 2)
    # Tokens that are not asked for may be anything.
    asked = np.arange(1, 3 * tokens, 3)
    wanted = plain_coefficients(basis, 0, keys, values, 0)[:, :, asked]
    keys[:, ::3], values[:, 2::3] = torch.nan, torch.nan
    transform = LayerTransform(basis, 0)
    sums, squares = np.full((2, 2 * kv_heads, head_dim), np.nan)
    cosine, sine = basis.rotation(0, 0, 3 * tokens)
    rotation = cosine.numpy(), sine.numpy(), np.float32(1 / float(basis.rope_scaling[0]))
    add_moments(flat(keys), flat(values), asked, rotation, transform._mean, transform._analysis, sums, squares)
    wanted_sums, wanted_squares = (
        wanted.sum(dim=2).reshape(sums.shape),
        wanted.square().sum(dim=2).reshape(sums.shape),
    )
    torch.testing.assert_close(torch.from_numpy(sums), wanted_sums, rtol=1e-3, atol=1e-3 * tokens)
    torch.testing.assert_close(torch.from_numpy(squares), wanted_squares, rtol=1e-3, atol=1e-3 * tokens)
