"""Layers and bases whose coding is exact on every machine: numbers that look random and have few bits."""

from functools import cache

import numpy as np
import torch

from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.geometry import KvGeometry

# Tokens of a prompt, and how far apart in the logits the levels are.
PROMPTS = {1: 1.0, 7: 1.0, 130: 2.0**-4, 401: 2.0**-6}


# A level has two digits, so that both are exact in bfloat16.
DIGIT = 16


def numbers(*shape: int, salt: int) -> torch.Tensor:
    """Multiples of 1/8 from -5 to 5 that look random."""
    counted = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(salt << 32)
    for factor, shift in ((0x9E3779B97F4A7C15, 29), (0xBF58476D1CE4E5B9, 32)):
        counted = (counted ^ (counted >> np.uint64(shift))) * np.uint64(factor)
    drawn = (counted >> np.uint64(40)) % np.uint64(81)
    return torch.from_numpy(drawn.astype(np.float32)).sub(40).div(8).view(shape)


@cache
def capture(geometry: KvGeometry, layer: int, tokens: int) -> LayerCapture:
    """A layer whose last position looks at each token as much as the token's level says, no two of them alike."""
    keys, values = numbers(2, geometry.kv_heads, tokens, geometry.head_dim, salt=layer + 1)
    levels = (torch.arange(tokens) * 37 + 11 * layer) % tokens
    keys[:, :, 0], keys[:, :, 1] = (levels // DIGIT).float(), (levels % DIGIT).float()
    queries = torch.zeros(2 * geometry.kv_heads, 1, geometry.head_dim)
    queries[:, :, 0], queries[:, :, 1] = DIGIT, 1
    dtype = geometry.native_dtype
    return LayerCapture(queries.to(dtype), keys.to(dtype), values.to(dtype), PROMPTS[tokens], 64.0, None, layer)


@cache
def basis_of(geometry: KvGeometry) -> CalibratedBasis:
    """Sums and differences of neighbours, shuffled differently in each layer, times powers of two from 8 to 1/8."""
    lead, width = (geometry.layers, 2, geometry.kv_heads), geometry.head_dim
    pairs = torch.kron(torch.eye(width // 2), torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    scale = torch.tensor([2.0 ** (3 - 7 * column // width) for column in range(width)])
    shuffled = [pairs[:, (torch.arange(width) * 7 + head) % width] * scale for head in range(int(np.prod(lead)))]
    return CalibratedBasis(
        mean=numbers(*lead, width, salt=0),
        analysis=torch.stack(shuffled).view(*lead, width, width),
        std=(2 * scale).expand(*lead, -1).contiguous(),
        attention_exponent=torch.ones(geometry.layers),
        rope_frequencies=torch.zeros(geometry.layers, width // 2, dtype=torch.float64),
        rope_scaling=torch.full((geometry.layers,), 0.5, dtype=torch.float64),
    )
