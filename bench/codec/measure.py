"""Measure how fast codecs encode and decode a KV cache, against a plain copy of the same cache at 16 bits."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from spectrumkv.bench.codec.under_test import CodecUnderTest
from spectrumkv.bench.models.synthetic_prompt import SyntheticCache
from spectrumkv.bench.timing import interleaved_medians, replayed, timed, timed_on_gpu


def measure(
    cache: SyntheticCache, under_test: Sequence[CodecUnderTest], rounds: int, on_round: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Time every codec and a plain copy in turn; return a row for each codec and tier.

    A rate is the bytes of the cache at 16 bits an element, whatever was really moved, divided by the median seconds.

    Args:
        cache: the cache that is encoded and decoded.
        under_test: the codecs.
        rounds: rounds that count.
        on_round: called after each round with a text that says which round it was.

    Returns:
        A row for each codec and tier.
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


def _copy_of_fp16(cache: SyntheticCache) -> Callable[[], None]:
    """Return a copy of as many bytes as the cache has at 16 bits, layer by layer, with as many threads as codecs."""
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


def _row(one: CodecUnderTest, cache: SyntheticCache, rates: dict[tuple[str, str, str], float]) -> dict[str, Any]:
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
