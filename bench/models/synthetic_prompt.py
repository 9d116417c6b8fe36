"""Make up what a model computes for a prompt: random keys and values, what its layers show, and a basis."""

from dataclasses import dataclass

import torch

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.geometry import KvGeometry

# This identifier is as long as those that the prefill service draws.
REQUEST_ID = "0" * 32
# Binary logarithms of the smallest and the largest standard deviation: about those of a calibrated basis.
NARROWEST, WIDEST = -3.0, 3.0


@dataclass(frozen=True, eq=False)
class SyntheticCache:
    """Hold a KV cache of random numbers in the layout of a model's: token by token, the heads side by side.

    Attributes:
        geometry: its shape.
        keys: per layer `[kv_heads, n, head_dim]` in the geometry's native dtype.
        values: like `keys`.
    """

    geometry: KvGeometry
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    @classmethod
    def random(cls, geometry: KvGeometry, tokens: int, device: torch.device) -> "SyntheticCache":
        """Return a cache of random elements with the standard normal distribution.

        Args:
            geometry: the shape of the cache.
            tokens: tokens of the prompt, 1 or more.
            device: where the tensors lie.

        Raises:
            InvalidArgumentError: there are no tokens.
        """
        if tokens < 1:
            raise InvalidArgumentError(f"--tokens is {tokens}; allowed: 1 or more")
        generator = torch.Generator().manual_seed(0)
        shape = (2, geometry.layers, tokens, geometry.kv_heads, geometry.head_dim)
        states = torch.randn(shape, generator=generator).to(device, geometry.native_dtype).transpose(2, 3)
        return cls(geometry, tuple(states[0]), tuple(states[1]))

    @property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return self.keys[0].shape[1]

    @property
    def device(self) -> torch.device:
        """Return the device of the tensors."""
        return self.keys[0].device


def layer_captures(cache: SyntheticCache, query_heads: int, window: int) -> list[LayerCapture]:
    """Return what the layers of a cache show, with random queries.

    Args:
        cache: keys and values.
        query_heads: number of query heads, a multiple of the KV heads.
        window: how many of the last queries are shown.

    Raises:
        InvalidArgumentError: the window does not fit the cache.
    """
    geometry = cache.geometry
    if not 1 <= window <= cache.tokens:
        raise InvalidArgumentError(f"--window is {window}; allowed: 1 to --tokens, {cache.tokens}")
    generator = torch.Generator().manual_seed(2)
    shape = (query_heads, window, geometry.head_dim)
    return [
        LayerCapture(
            queries=torch.randn(shape, generator=generator).to(cache.device, geometry.native_dtype),
            keys=keys,
            values=values,
            scaling=geometry.head_dim**-0.5,
            softcap=None,
            sliding_window=None,
            layer=layer,
        )
        for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True))
    ]


def synthetic_basis(geometry: KvGeometry) -> CalibratedBasis:
    """Return a basis that scales standard normal elements to standard deviations like those of a model."""
    lead = (geometry.layers, 2, geometry.kv_heads)
    std = torch.linspace(WIDEST, NARROWEST, geometry.head_dim).exp2()
    frequencies = 1e4 ** (-torch.arange(geometry.head_dim // 2, dtype=torch.float64) * 2 / geometry.head_dim)
    return CalibratedBasis(
        mean=torch.zeros(*lead, geometry.head_dim),
        analysis=torch.diag(std).expand(*lead, -1, -1).contiguous(),
        std=std.expand(*lead, -1).contiguous(),
        attention_exponent=torch.ones(geometry.layers),
        rope_frequencies=frequencies.expand(geometry.layers, -1).contiguous(),
        rope_scaling=torch.ones(geometry.layers, dtype=torch.float64),
    )
