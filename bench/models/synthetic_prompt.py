"""A spectral basis for caches of random numbers, which no model made."""

import torch

from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.kv.geometry import KvGeometry

# Binary logarithms of the least and the largest spread: about what a calibrated basis has.
NARROWEST, WIDEST = -3.0, 3.0


def synthetic_basis(geometry: KvGeometry) -> SpectralBasis:
    """Return a basis that scales standard normal elements to spreads as models have them."""
    lead = (geometry.layers, 2, geometry.kv_heads)
    spread = torch.linspace(WIDEST, NARROWEST, geometry.head_dim).exp2()
    return SpectralBasis(
        mean=torch.zeros(*lead, geometry.head_dim),
        analysis=torch.diag(spread).expand(*lead, -1, -1).contiguous(),
        spread=spread.expand(*lead, -1).contiguous(),
        attention_exponent=torch.ones(geometry.layers),
        rope_frequencies=1e4 ** (-torch.arange(geometry.head_dim // 2, dtype=torch.float64) * 2 / geometry.head_dim),
        rope_scaling=1.0,
    )
