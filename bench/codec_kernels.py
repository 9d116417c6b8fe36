"""The kernels beneath codec absmax alone: no body to lay out, no checks, no way to the host and back."""

import torch

from spectrumkv.bench.codec import Cache, CodecUnderTest
from spectrumkv.common.kv.absmax import FORMATS
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.kernels.absmax import dequantize, quantize


def kernels_under_test(cache: Cache) -> list[CodecUnderTest]:
    """The quantizing and dequantizing kernels at each code format, all on the cache's device."""
    return [AbsmaxKernels(tier, cache) for tier in sorted(FORMATS)]


class AbsmaxKernels:
    """Kernels at one code format.

    Args:
        tier: INT8 or INT4.
        cache: what to code.
    """

    codec = "absmax-kernels"

    def __init__(self, tier: Tier, cache: Cache) -> None:
        self.tier = tier.label
        self._form = FORMATS[tier]
        self._states = [*cache.keys, *cache.values]
        self._slots = [torch.empty_like(one, memory_format=torch.contiguous_format) for one in self._states]
        self._index = torch.arange(cache.tokens, device=cache.device)
        geometry, device = cache.geometry, cache.device
        rows = (len(self._states), geometry.kv_heads, cache.tokens)
        self._codes = torch.empty(
            *rows, self._form.code_bytes(geometry.head_dim), dtype=self._form.dtype, device=device
        )
        self._scales = torch.empty(rows, dtype=torch.float16, device=device)

    def encode(self) -> None:
        """See `CodecUnderTest.encode`."""
        for states, codes, scales in zip(self._states, self._codes, self._scales, strict=True):
            quantize(states, self._index, codes, scales, self._form)

    def decode(self) -> None:
        """See `CodecUnderTest.decode`."""
        for states, codes, scales in zip(self._slots, self._codes, self._scales, strict=True):
            dequantize(codes, scales, self._index, states, self._form)
