"""Define what `codec` times: the registered codecs, the kernels beneath codec absmax alone, and quanto's quantizer.

quanto comes with the optional extra `peers`. It codes INT4 as transformers' QuantizedCache calls it (groups of 64, a
scale and a zero point each), and INT8, which that cache does not offer, with one scale for each token in each KV
head, like codec absmax.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from spectrumkv.bench.models.synthetic_prompt import SyntheticCache
from spectrumkv.bench.peers.quanto import GROUP_SIZE
from spectrumkv.bench.timing import replayed
from spectrumkv.common.kv.codecs.absmax import TIERS
from spectrumkv.common.kv.codecs.tiered import TierCodec, tier_codecs
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.kernels import absmax

# The tier of rows whose tokens take all tiers of the codec in equal numbers, at random.
MIXED = "mixed"


class CodecUnderTest(Protocol):
    """Encode and decode a whole cache, layer by layer.

    Attributes:
        codec: its name in rows.
        tier: its tier in rows.
        moved_bytes: bytes that `encode`, and likewise `decode`, reads and writes in the device's memory; None if
            something other than moving them takes time.
    """

    @property
    def codec(self) -> str: ...  # noqa: D102
    @property
    def tier(self) -> str: ...  # noqa: D102
    @property
    def moved_bytes(self) -> int | None: ...  # noqa: D102

    def encode(self) -> None:
        """Encode every layer."""
        ...

    def decode(self) -> None:
        """Decode every layer, after `encode`."""
        ...


def registered_codecs(cache: SyntheticCache) -> list[CodecUnderTest]:
    """Return every codec of tiers at each of its tiers except DROP, which moves nothing, and at all tiers mixed."""
    found: list[CodecUnderTest] = []
    for codec in tier_codecs().values():
        tiers = sorted(codec.tiers - {Tier.DROP})
        found += [RegisteredCodec(codec, [tier], cache) for tier in tiers]
        if len(tiers) > 1:
            found.append(RegisteredCodec(codec, tiers, cache))
    return found


class RegisteredCodec:
    """Run one of SpectrumKV's codecs at one tier, or at several mixed.

    Args:
        codec: a codec of the registry.
        tiers: the tiers that tokens take in equal numbers.
        cache: the cache to encode.

    Attributes:
        slots: what `decode` writes: keys and values of each layer in turn, `[kv_heads, n, head_dim]`.
    """

    def __init__(self, codec: TierCodec, tiers: Sequence[Tier], cache: SyntheticCache) -> None:
        self.codec = codec.name
        self.tier = tiers[0].label if len(tiers) == 1 else MIXED
        self._codec = codec
        self._cache = cache
        self.moved_bytes = None
        self._tiers = spread_tiers(tiers, cache.tokens)
        self._bodies: list[torch.Tensor] = []
        # The slots have the layout of the decode service: head by head.
        self.slots = [torch.empty_like(cache.keys[0], memory_format=torch.contiguous_format) for _ in cache.keys * 2]

    def encode(self) -> None:
        """See `CodecUnderTest.encode`."""
        geometry = self._cache.geometry
        self._bodies = [
            self._codec.encode(keys, values, self._tiers, geometry).body
            for keys, values in zip(self._cache.keys, self._cache.values, strict=True)
        ]

    def decode(self) -> None:
        """See `CodecUnderTest.decode`."""
        for layer, body in enumerate(self._bodies):
            keys, values = self.slots[2 * layer], self.slots[2 * layer + 1]
            self._codec.decode(body, self._tiers, keys, values, self._cache.geometry)


def kernels_under_test(cache: SyntheticCache) -> list[CodecUnderTest]:
    """Return the kernels at each tier except DROP, and at all tiers mixed, on the cache's device."""
    moving = sorted(TIERS - {Tier.DROP})
    return [*(AbsmaxKernels([tier], cache) for tier in moving), AbsmaxKernels(sorted(TIERS), cache)]


class AbsmaxKernels:
    """Run the kernels beneath codec absmax, without checks and copies to the host, at one tier or at several mixed.

    On a GPU all layers are one CUDA graph, so that the time is the device's and not that of launching.

    Args:
        tiers: the tiers that tokens take in equal numbers.
        cache: the cache to encode.
    """

    codec = "absmax-kernels"

    def __init__(self, tiers: Sequence[Tier], cache: SyntheticCache) -> None:
        self.tier = tiers[0].label if len(tiers) == 1 else MIXED
        of_tokens = spread_tiers(tiers, cache.tokens)
        geometry = cache.geometry
        body = absmax.segment_layout(of_tokens, geometry.kv_heads, geometry.head_dim).bytes
        kept = int((of_tokens != Tier.DROP).sum())
        self.moved_bytes = geometry.layers * (body + kept * geometry.native_bytes_per_token_layer)
        bodies = torch.empty(geometry.layers, body, dtype=torch.uint8, device=cache.device)
        slots = [torch.empty_like(one, memory_format=torch.contiguous_format) for one in (*cache.keys, *cache.values)]
        boundaries = (0, cache.tokens)
        encoded = list(zip(cache.keys, cache.values, bodies, strict=True))
        decoded = list(zip(slots[: geometry.layers], slots[geometry.layers :], bodies, strict=True))
        if cache.device.type == "cuda":
            from spectrumkv.kernels.absmax import triton as absmax_triton

            encoders = [
                absmax_triton.encoding(keys, values, of_tokens, boundaries, body) for keys, values, body in encoded
            ]
            decoders = [
                absmax_triton.decoding(body, of_tokens, boundaries, keys, values) for keys, values, body in decoded
            ]
            self.encode, self.decode = replayed(encoders), replayed(decoders)
            return

        def encode() -> None:
            for keys, values, body in encoded:
                absmax.encode(keys, values, of_tokens, boundaries, body)

        def decode() -> None:
            for keys, values, body in decoded:
                absmax.decode(body, of_tokens, boundaries, keys, values)

        self.encode, self.decode = encode, decode


def quanto_codecs(cache: SyntheticCache) -> list[CodecUnderTest]:
    """Return quanto at INT4 and INT8; nothing if it is not installed or its groups do not fit the cache."""
    if importlib.util.find_spec("optimum") is None or importlib.util.find_spec("optimum.quanto") is None:
        return []
    if cache.keys[0].numel() % GROUP_SIZE:
        return []
    return [QuantoCodec(tier, cache) for tier in (Tier.INT4, Tier.INT8)]


def add_ratios_to_quanto(rows: Sequence[dict[str, Any]]) -> None:
    """Add to every row its rates divided by quanto's at the same tier; None if quanto has no such tier.

    Args:
        rows: the rows of one run of `measure`.
    """
    theirs = {row["tier"]: row for row in rows if row["codec"] == QuantoCodec.codec}
    for row in rows:
        peer = theirs.get(row["tier"])
        for direction in ("encode", "decode"):
            rate = f"{direction}_gbps"
            row[f"{direction}_ratio_to_quanto"] = row[rate] / peer[rate] if peer else None


class QuantoCodec:
    """Run quanto at INT4 or INT8.

    Args:
        tier: the tier.
        cache: the cache to quantize.
    """

    codec = "quanto"
    moved_bytes = None

    def __init__(self, tier: Tier, cache: SyntheticCache) -> None:
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


# Functions that turn `[kv_heads, n, head_dim]` into one of quanto's tensors.
quantizers = {Tier.INT4: _quantize_int4, Tier.INT8: _quantize_int8}


def spread_tiers(tiers: Sequence[Tier], tokens: int) -> torch.Tensor:
    """Return a tier for each token, uint8 `[tokens]`: the given tiers in equal numbers, at random."""
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    return torch.tensor(tiers, dtype=torch.uint8)[order % len(tiers)]
