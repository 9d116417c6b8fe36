"""How fast codecs turn a KV cache into bytes and back, against a plain copy of the same cache at 16 bits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from spectrumkv.bench.codec.interleaving import interleaved_medians, timed, timed_on_gpu
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.codecs.tiered import TierCodec, tier_codecs
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.tiers import Tier

MIXED = "mixed"
"""The tier of rows whose tokens take all tiers of the codec in equal numbers, at random."""


class CodecUnderTest(Protocol):
    """Codes and decodes a whole cache, layer by layer.

    Attributes:
        codec: its name in rows.
        tier: the precision, in rows.
        moved_bytes: what `encode` reads and writes in the device's memory, and `decode`, where nothing else takes
            time; None where something does.
    """

    @property
    def codec(self) -> str: ...  # noqa: D102
    @property
    def tier(self) -> str: ...  # noqa: D102
    @property
    def moved_bytes(self) -> int | None: ...  # noqa: D102

    def encode(self) -> None:
        """Code every layer."""
        ...

    def decode(self) -> None:
        """Decode every layer; `encode` was called before."""
        ...


@dataclass(frozen=True, eq=False)
class Cache:
    """A synthetic KV cache, laid out as models leave it: token by token, the heads side by side.

    Attributes:
        geometry: its shape.
        keys: per layer `[kv_heads, n, head_dim]`.
        values: like `keys`.
    """

    geometry: KvGeometry
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    @classmethod
    def random(cls, geometry: KvGeometry, tokens: int, device: torch.device) -> "Cache":
        """Draw a cache of standard normal elements.

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
        """How many tokens it holds."""
        return self.keys[0].shape[1]

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.keys[0].device


class RegisteredCodec:
    """One of SpectrumKV's codecs at one tier, or at all of its tiers mixed.

    Args:
        codec: from the registry.
        tiers: the tiers that tokens take in equal numbers.
        cache: what to code.

    Attributes:
        slots: where `decode` writes: keys and values of each layer in turn, `[kv_heads, n, head_dim]`.
    """

    def __init__(self, codec: TierCodec, tiers: Sequence[Tier], cache: Cache) -> None:
        self.codec = codec.name
        self.tier = tiers[0].label if len(tiers) == 1 else MIXED
        self._codec = codec
        self._cache = cache
        self.moved_bytes = None
        self._tiers = spread_tiers(tiers, cache.tokens)
        self._bodies: list[torch.Tensor] = []
        # Slots, as decode lays them out: head by head.
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


def spread_tiers(tiers: Sequence[Tier], tokens: int) -> torch.Tensor:
    """Give tokens these tiers in equal numbers, at random: uint8 `[tokens]`."""
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    return torch.tensor(tiers, dtype=torch.uint8)[order % len(tiers)]


def registered_codecs(cache: Cache) -> list[CodecUnderTest]:
    """Every codec that writes the tiers of policies: at each tier but DROP, which moves nothing, and at all mixed."""
    found: list[CodecUnderTest] = []
    for codec in tier_codecs().values():
        tiers = sorted(codec.tiers - {Tier.DROP})
        found += [RegisteredCodec(codec, [tier], cache) for tier in tiers]
        if len(tiers) > 1:
            found.append(RegisteredCodec(codec, tiers, cache))
    return found


def measure(
    cache: Cache, under_test: Sequence[CodecUnderTest], rounds: int, on_round: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Time every codec and a plain copy in turn; return a row for each codec and tier.

    Rates are bytes of the cache at 16 bits an element, whatever was really moved, by median seconds.

    Args:
        cache: what is coded.
        under_test: which codecs.
        rounds: rounds that count.
        on_round: called after each round.
    """
    clock = timed_on_gpu if cache.device.type == "cuda" else timed
    operations = {("memcpy", "", "copy"): clock(_copy_of_fp16(cache))}
    for one in under_test:
        operations[one.codec, one.tier, "encode"] = clock(one.encode)
        operations[one.codec, one.tier, "decode"] = clock(one.decode)
    medians = interleaved_medians(operations, rounds, on_round)
    gigabytes = cache.geometry.fp16_bytes(cache.tokens) / 1e9
    rates = {name: gigabytes / seconds for name, seconds in medians.items()}
    return [_row(one, cache, rates) for one in under_test]


def _copy_of_fp16(cache: Cache) -> Callable[[], None]:
    """A copy of as many bytes as the cache has at 16 bits, layer by layer, by as many threads as codecs have."""
    shape = (cache.geometry.layers, cache.geometry.fp16_bytes_per_layer(cache.tokens))
    source = torch.ones(shape, dtype=torch.uint8, device=cache.device)
    target = torch.zeros_like(source)

    copies = [partial(to_layer.copy_, from_layer) for from_layer, to_layer in zip(source, target, strict=True)]
    if cache.device.type == "cuda":
        return replayed(copies)

    def copy() -> None:
        for copy_layer in copies:
            copy_layer()

    return copy


def replayed(launches: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """Capture launches in a CUDA graph; return what replays it, so that launching takes no time worth mentioning."""
    for launch in launches:
        # Compiled before anything is captured.
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()

    def replay() -> None:
        # The launches hold the memory that the graph reads and writes.
        assert launches
        graph.replay()

    return replay


def _row(one: CodecUnderTest, cache: Cache, rates: dict[tuple[str, str, str], float]) -> dict[str, Any]:
    memcpy = rates["memcpy", "", "copy"]
    encode, decode = rates[one.codec, one.tier, "encode"], rates[one.codec, one.tier, "decode"]
    # A copy reads and writes what it copies.
    work = None if one.moved_bytes is None else one.moved_bytes / (2 * cache.geometry.fp16_bytes(cache.tokens))
    return {
        "device": cache.device.type,
        "dtype": str(cache.geometry.native_dtype).removeprefix("torch."),
        "codec": one.codec,
        "tier": one.tier,
        "tokens": cache.tokens,
        "encode_gbps": encode,
        "decode_gbps": decode,
        "memcpy_gbps": memcpy,
        "encode_ratio": encode / memcpy,
        "decode_ratio": decode / memcpy,
        "encode_bandwidth_ratio": None if work is None else work * encode / memcpy,
        "decode_bandwidth_ratio": None if work is None else work * decode / memcpy,
    }
