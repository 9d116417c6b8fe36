"""From chunks on the stream to keys and values in the slots."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Self

import torch

from spectrumkv.common.concurrency.cuda_stream import KvStream, record_event
from spectrumkv.common.kv.codecs.base import SegmentDecoder
from spectrumkv.common.kv.receiving import SegmentWriter
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.tiers import Tier, count_tiers
from spectrumkv.common.kv.wire import ChunkReader, ChunkTotals, KvChunk
from spectrumkv.common.rpc.decode_stream import Request
from spectrumkv.common.telemetry.metrics import FRAMING, Metrics
from spectrumkv.decode_server.kv_pool import Allocation, KvPool
from spectrumkv.v1 import decode_pb2

# The share of a core that receiving may use while requests generate: a model's step waits for its slowest thread.
SHARE_OF_A_CORE = 0.25
# How many messages may wait to be dequantized on a GPU.
MESSAGES_AHEAD = 8


def throttled(messages: Iterator[Request], wait_until_idle: Callable[[float], object]) -> Iterator[Request]:
    """Yield messages at the pace of `SHARE_OF_A_CORE` while requests generate; prefill feels it as a slower link.

    KV that arrives as it is computed is slower than that; a burst is held up. Only chunks wait: Begin and End do not.

    Args:
        messages: the stream's messages, read and worked on by one thread.
        wait_until_idle: waits for this many seconds, or until no request generates.

    Yields:
        The same messages.
    """
    worked_until = time.thread_time()
    owed = 0.0
    for message in messages:
        if isinstance(message, KvChunk) and owed > 0:
            wait_until_idle(owed)
            owed = 0.0
        yield message
        now = time.thread_time()
        owed += (now - worked_until) * (1 / SHARE_OF_A_CORE - 1)
        worked_until = now


class KvReceiver:
    """Verifies the KV of one request and dequantizes it straight into its slots.

    A context manager: when it ends, nothing is written any more.

    Args:
        pool: the pool of this process.
        allocation: the request's slots.
        decoder: decodes segments in the codec that Begin named.
        prompt_tokens: how many tokens' KV must arrive.
        metrics: count every byte.
    """

    def __init__(
        self,
        pool: KvPool,
        allocation: Allocation,
        decoder: SegmentDecoder,
        prompt_tokens: int,
        metrics: Metrics,
    ) -> None:
        self._geometry = pool.geometry
        self._writer = SegmentWriter(decoder, allocation)
        self._metrics = metrics
        self._reader = ChunkReader(self._geometry.layers, prompt_tokens)
        self._stream = KvStream(pool.keys.device)
        # The request that had the slots before may have left work on another stream, which must be done first.
        self._free = record_event(pool.keys)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The next request in these slots must not find this request's KV arriving.
        self._stream.synchronize()

    def accept(self, chunk: KvChunk, serialized_bytes: int) -> None:
        """Check a chunk and write its tokens into the slots.

        Args:
            chunk: as it arrived.
            serialized_bytes: length of the whole message that holds it.

        Raises:
            DataLossError: the chunk is damaged, out of order, repeated or malformed.
        """
        segments = self._reader.read(chunk)
        with self._stream.working(self._free):
            tier_bytes = self._write(segments)
        self._count(segments, tier_bytes, serialized_bytes)

    def finish(self, end: decode_pb2.End) -> None:
        """Check that all KV arrived as it was sent, and wait until all of it is in the slots.

        Args:
            end: says what prefill sent.

        Raises:
            DataLossError: something else arrived.
        """
        self._reader.finish(ChunkTotals(end.chunks, end.payload_bytes, end.digest))
        self._stream.synchronize()

    def _write(self, segments: list[KvSegment]) -> list[Mapping[Tier, int]]:
        """Return how many bytes of each segment each tier took, after all were decoded into the slots."""
        return self._writer.write(segments)

    def _count(self, segments: list[KvSegment], tier_bytes: list[Mapping[Tier, int]], serialized_bytes: int) -> None:
        tiers = torch.cat([segment.tiers for segment in segments])
        self._metrics.kv_fp16_equivalent_bytes.inc(self._geometry.fp16_bytes_per_layer(tiers.numel()))
        for tier, tokens in count_tiers(tiers).items():
            self._metrics.kv_tokens.labels(tier.label).inc(tokens / self._geometry.layers)
        # Summed up first: naming a counter costs more than adding to it.
        coded = sum((Counter(sizes) for sizes in tier_bytes), Counter[Tier]())
        for tier, size in coded.items():
            self._metrics.kv_bytes_received.labels(tier.label).inc(size)
        self._metrics.kv_bytes_received.labels(FRAMING).inc(serialized_bytes - coded.total())
