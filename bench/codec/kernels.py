"""The kernels beneath codec absmax alone: no checks, no way to the host and back.

On a GPU all layers are one CUDA graph, so that what is timed is the device's work and not the launching of it.
"""

from collections.abc import Sequence

import torch

from spectrumkv.bench.codec.measure import MIXED, Cache, CodecUnderTest, replayed, spread_tiers
from spectrumkv.common.kv.codecs.absmax import TIERS, sections
from spectrumkv.common.kv.codecs.body import body_bytes
from spectrumkv.common.kv.tiers import Tier, count_tiers
from spectrumkv.kernels import absmax


def kernels_under_test(cache: Cache) -> list[CodecUnderTest]:
    """The kernels at each tier but DROP, and at all tiers mixed, on the cache's device."""
    moving = sorted(TIERS - {Tier.DROP})
    return [*(AbsmaxKernels([tier], cache) for tier in moving), AbsmaxKernels(sorted(TIERS), cache)]


class AbsmaxKernels:
    """The kernels at one tier, or at several mixed.

    Args:
        tiers: the tiers that tokens take in equal numbers.
        cache: what to code.
    """

    codec = "absmax-kernels"

    def __init__(self, tiers: Sequence[Tier], cache: Cache) -> None:
        self.tier = tiers[0].label if len(tiers) == 1 else MIXED
        of_tokens = spread_tiers(tiers, cache.tokens)
        geometry = cache.geometry
        body = body_bytes(sections(count_tiers(of_tokens), geometry))
        kept = int((of_tokens != Tier.DROP).sum())
        self.moved_bytes = geometry.layers * (body + kept * geometry.native_bytes_per_token_layer)
        bodies = torch.empty(geometry.layers, body, dtype=torch.uint8, device=cache.device)
        slots = [torch.empty_like(one, memory_format=torch.contiguous_format) for one in (*cache.keys, *cache.values)]
        cuts = (0, cache.tokens)
        encoded = list(zip(cache.keys, cache.values, bodies, strict=True))
        decoded = list(zip(slots[: geometry.layers], slots[geometry.layers :], bodies, strict=True))
        if cache.device.type == "cuda":
            from spectrumkv.kernels.absmax import triton as absmax_triton

            encoders = [absmax_triton.encoding(keys, values, of_tokens, cuts, body) for keys, values, body in encoded]
            decoders = [absmax_triton.decoding(body, of_tokens, cuts, keys, values) for keys, values, body in decoded]
            self.encode, self.decode = replayed(encoders), replayed(decoders)
            return

        def encode() -> None:
            for keys, values, body in encoded:
                absmax.encode(keys, values, of_tokens, cuts, body)

        def decode() -> None:
            for keys, values, body in decoded:
                absmax.decode(body, of_tokens, cuts, keys, values)

        self.encode, self.decode = encode, decode
