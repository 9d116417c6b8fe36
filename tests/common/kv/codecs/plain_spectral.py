"""The spectral transform in plain torch, float64: what compiled loops are measured against."""

import torch

from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis


def turned(states: torch.Tensor, basis: SpectralBasis, first: int, direction: int) -> torch.Tensor:
    """Keys `[kv_heads, n, d]` turned by the rotary angles of positions `first` and up, or back: direction 1 or -1."""
    half = states.shape[-1] // 2
    positions = torch.arange(first, first + states.shape[1], dtype=torch.float64)
    angle = direction * positions[:, None] * basis.rope_frequencies
    complex_states = torch.complex(states[..., :half], states[..., half:]) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat([complex_states.real, complex_states.imag], dim=-1)


def plain_coefficients(
    basis: SpectralBasis, layer: int, keys: torch.Tensor, values: torch.Tensor, first: int
) -> torch.Tensor:
    """Coefficients of tokens at positions `first` and up: float64 `[2, kv_heads, n, d]`."""
    unrotated = turned(keys.double(), basis, first, -1) / basis.rope_scaling
    states = torch.stack([unrotated, values.double()])
    return (states - basis.mean[layer].double()[:, :, None]) @ basis.analysis[layer].double()


def plain_states(basis: SpectralBasis, layer: int, coefficients: torch.Tensor, first: int) -> torch.Tensor:
    """Inverse of `plain_coefficients`: keys and values, float64 `[2, kv_heads, n, d]`."""
    states = coefficients.double() @ basis.analysis[layer].double().inverse()
    states = states + basis.mean[layer].double()[:, :, None]
    return torch.stack([turned(states[0], basis, first, 1) * basis.rope_scaling, states[1]])
