"""Bases and layers for tests of the spectral codec, and its transform in plain torch: what compiled loops must do."""

import torch

from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.codecs.calibrated.request import CalibratedRequest
from spectrumkv.common.kv.codecs.spectral.encoder import SpectralEncoder
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.kernels.spectral import reference


def geometry(kv_heads: int = 2, head_dim: int = 16, layers: int = 3) -> KvGeometry:
    return KvGeometry(layers, kv_heads, head_dim, torch.float32)


def basis_of(shape: KvGeometry, seed: int = 0) -> CalibratedBasis:
    """A basis with random directions and standard deviations over four decades, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    lead = (shape.layers, 2, shape.kv_heads)
    directions = torch.linalg.qr(torch.randn(*lead, shape.head_dim, shape.head_dim, generator=generator)).Q
    scales = torch.rand(*lead, shape.head_dim, generator=generator).mul(3).exp()
    # Each layer turns keys in its own way.
    slowest = 10.0 ** torch.arange(4, 4 + shape.layers, dtype=torch.float64)
    return CalibratedBasis(
        mean=torch.randn(*lead, shape.head_dim, generator=generator),
        analysis=directions * scales[..., None, :],
        std=torch.rand(*lead, shape.head_dim, generator=generator).mul(9).sub(5).exp().sort(descending=True).values,
        attention_exponent=torch.ones(shape.layers),
        rope_frequencies=slowest[:, None] ** (-torch.arange(0, shape.head_dim, 2).double() / shape.head_dim),
        rope_scaling=torch.linspace(1.0, 1.5, shape.layers, dtype=torch.float64),
    )


def capture(basis: CalibratedBasis, layer: int, tokens: int, mismatch: float = 1.0, first: int = 0) -> LayerCapture:
    """A layer whose coefficients have the standard deviations that the basis says, times `mismatch`."""
    generator = torch.Generator().manual_seed(layer)
    _, sides, kv_heads, head_dim = basis.mean.shape
    coefficients = torch.randn(sides, kv_heads, tokens, head_dim, generator=generator)
    coefficients *= basis.std[layer][:, :, None] * mismatch
    keys, values = plain_states(basis, layer, coefficients, first).float()
    queries = torch.randn(2 * kv_heads, min(tokens, 8), head_dim, generator=generator)
    return LayerCapture(queries, keys, values, head_dim**-0.5, None, None, layer)


def encoder_of(basis: CalibratedBasis, shape: KvGeometry, tokens: int, budget: float) -> SpectralEncoder:
    return SpectralEncoder(
        CalibratedRequest(basis, shape, tokens, int(budget * shape.fp16_bytes(tokens)), "attention", 0)
    )


def plain_coefficients(
    basis: CalibratedBasis, layer: int, keys: torch.Tensor, values: torch.Tensor, first: int
) -> torch.Tensor:
    """Coefficients of tokens at positions `first` and up: float64 `[2, kv_heads, n, d]`."""
    angles, scaling = _rotation(basis, layer, first, keys.shape[1])
    return reference.analyse(keys, values, angles, scaling, basis.mean[layer], basis.analysis[layer])


def plain_states(basis: CalibratedBasis, layer: int, coefficients: torch.Tensor, first: int) -> torch.Tensor:
    """Inverse of `plain_coefficients`: keys and values, float64 `[2, kv_heads, n, d]`."""
    angles, scaling = _rotation(basis, layer, first, coefficients.shape[2])
    return reference.synthesise(coefficients, angles, scaling, basis.mean[layer], basis.analysis[layer])


def _rotation(basis: CalibratedBasis, layer: int, first: int, tokens: int) -> tuple[torch.Tensor, float]:
    positions = torch.arange(first, first + tokens, dtype=torch.float64)
    return positions[:, None] * basis.rope_frequencies[layer], float(basis.rope_scaling[layer])
