"""quanto's quantizer on the same tensors, from the optional extra `peers`.

INT4 as transformers' QuantizedCache calls it (groups of 64, a scale and a zero point each); INT8, which that cache
does not offer, with one scale for each token in each KV head, as codec absmax has it.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from spectrumkv.bench.codec.measure import Cache, CodecUnderTest
from spectrumkv.common.kv.tiers import Tier

GROUP_SIZE = 64


def quanto_codecs(cache: Cache) -> list[CodecUnderTest]:
    """INT8 and INT4 by quanto; nothing where it is not installed or its groups do not fit the cache."""
    if importlib.util.find_spec("optimum") is None or importlib.util.find_spec("optimum.quanto") is None:
        return []
    if cache.keys[0].numel() % GROUP_SIZE:
        return []
    return [QuantoCodec(tier, cache) for tier in (Tier.INT4, Tier.INT8)]


def add_ratios_to_quanto(rows: Sequence[dict[str, Any]]) -> None:
    """Give every row its rates divided by quanto's at the same tier; None where quanto has no such tier.

    Args:
        rows: of `codec.measure`, from one run.
    """
    theirs = {row["tier"]: row for row in rows if row["codec"] == QuantoCodec.codec}
    for row in rows:
        peer = theirs.get(row["tier"])
        for direction in ("encode", "decode"):
            rate = f"{direction}_gbps"
            row[f"{direction}_ratio_to_quanto"] = row[rate] / peer[rate] if peer else None


class QuantoCodec:
    """quanto at INT4 or INT8.

    Args:
        tier: which.
        cache: what to code.
    """

    codec = "quanto"
    moved_bytes = None

    def __init__(self, tier: Tier, cache: Cache) -> None:
        self.tier = tier.label
        self._states = [*cache.keys, *cache.values]
        self._quantize = quantizers[tier]
        self._coded: list[Any] = []

    def encode(self) -> None:
        """See `CodecUnderTest.encode`."""
        self._coded = [self._quantize(states) for states in self._states]

    def decode(self) -> None:
        """See `CodecUnderTest.decode`."""
        for coded in self._coded:
            coded.dequantize()


def _quantize_int4(states: torch.Tensor) -> Any:
    from optimum.quanto import MaxOptimizer, qint4, quantize_weight

    rows = states.contiguous()
    scale, shift = MaxOptimizer()(rows, qint4, 0, GROUP_SIZE)
    return quantize_weight(rows, qint4, 0, scale, shift, GROUP_SIZE)


def _quantize_int8(states: torch.Tensor) -> Any:
    from optimum.quanto import AbsmaxOptimizer, qint8, quantize_weight

    rows = states.reshape(-1, states.shape[-1])
    return quantize_weight(rows, qint8, 0, AbsmaxOptimizer()(rows, qint8, 0))


quantizers = {Tier.INT4: _quantize_int4, Tier.INT8: _quantize_int8}
"""What turns `[kv_heads, n, head_dim]` into one of quanto's tensors."""
