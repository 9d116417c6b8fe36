"""The plain spectral transform of a basis' layer: what compiled loops are measured against."""

import torch

from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.kernels.spectral import reference


def plain_coefficients(
    basis: SpectralBasis, layer: int, keys: torch.Tensor, values: torch.Tensor, first: int
) -> torch.Tensor:
    """Coefficients of tokens at positions `first` and up: float64 `[2, kv_heads, n, d]`."""
    angles = _angles(basis, first, keys.shape[1])
    return reference.analyse(keys, values, angles, basis.rope_scaling, basis.mean[layer], basis.analysis[layer])


def plain_states(basis: SpectralBasis, layer: int, coefficients: torch.Tensor, first: int) -> torch.Tensor:
    """Inverse of `plain_coefficients`: keys and values, float64 `[2, kv_heads, n, d]`."""
    angles = _angles(basis, first, coefficients.shape[2])
    return reference.synthesise(coefficients, angles, basis.rope_scaling, basis.mean[layer], basis.analysis[layer])


def _angles(basis: SpectralBasis, first: int, tokens: int) -> torch.Tensor:
    positions = torch.arange(first, first + tokens, dtype=torch.float64)
    return positions[:, None] * basis.rope_frequencies
