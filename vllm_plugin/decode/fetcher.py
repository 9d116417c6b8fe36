"""Fetches one transfer: verifies and decodes what comes, into the pages of one request."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from spectrumkv.common.concurrency.cuda_stream import KvStream
from spectrumkv.common.errors import CancelledError, FailedPreconditionError
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.geometry import HeadRange, KvGeometry
from spectrumkv.common.kv.receiving import SegmentWriter
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.wire import ChunkReader, ChunkTotals, KvChunk
from spectrumkv.common.model.spec import ModelSpec
from spectrumkv.common.rpc.decode_stream import CHECKSUM_BYTES
from spectrumkv.common.rpc.status import error_from_rpc
from spectrumkv.common.rpc.transfer_methods import begin_fetch, chunks_until_end, expect_header, get_basis
from spectrumkv.v1 import kv_pb2, transfer_pb2
from spectrumkv.vllm_plugin.decode.bases import StreamBases
from spectrumkv.vllm_plugin.decode.page_slots import PageSlots
from spectrumkv.vllm_plugin.decode.prefetch import Prefetch
from spectrumkv.vllm_plugin.layers import EngineLayer, slots_of
from spectrumkv.vllm_plugin.scheduler.steps import Load, TransferRef
from spectrumkv.vllm_plugin.stats import Tally


@dataclass(frozen=True, eq=False)
class ConsumerRank:
    """What a consuming worker is.

    Attributes:
        spec: of the model.
        geometry: of all KV heads.
        rank: of this worker.
        ranks: of the consumer.
        layers: of the model, in order, with this rank's pages.
        block_tokens: tokens of the scheduler's blocks.
    """

    spec: ModelSpec
    geometry: KvGeometry
    rank: int
    ranks: int
    layers: list[EngineLayer]
    block_tokens: int

    @property
    def heads(self) -> HeadRange:
        """Return the KV heads of this rank."""
        return HeadRange.of_rank(self.rank, self.ranks, self.geometry.kv_heads)


class Fetch:
    """One load under way; `cancel` ends it from another thread.

    Args:
        load: what to fetch.
        consumer: this worker.
        bases: of the streams.
        timeout: seconds that it may take.
        tally: counts what came.
        prefetch: receives the transfer; None where it was not announced.
    """

    def __init__(
        self,
        load: Load,
        consumer: ConsumerRank,
        bases: StreamBases,
        timeout: float,
        tally: Tally,
        prefetch: Prefetch | None = None,
    ) -> None:
        self.load, self._prefetch = load, prefetch
        self._consumer, self._bases, self._timeout, self._tally = consumer, bases, timeout, tally
        self._lock = threading.Lock()
        self._call: Any = None
        self._cancelled = False

    def cancel(self) -> None:
        """End the fetch; nothing is written once `run` has returned."""
        with self._lock:
            self._cancelled = True
            if self._call is not None:
                self._call.cancel()

    def run(self, channels: list[grpc.Channel]) -> None:
        """Fetch, verify, decode and write.

        Args:
            channels: one to each rank of the producer.

        Raises:
            SpectrumKVError: some of the KV did not come as it was sent.
        """
        consumer, load = self._consumer, self.load
        slots = slots_of(load.block_ids, consumer.block_tokens, 0, load.tokens)
        pages = PageSlots(
            consumer.layers, consumer.geometry.of_heads(consumer.heads), consumer.heads, slots, load.skip
        )
        stream = KvStream(consumer.layers[0].pages.device)
        taken = self._prefetch if self._prefetch is not None and self._prefetch.take() else None
        try:
            for rank in streams_needed(consumer.heads, len(channels), consumer.geometry.kv_heads):
                self._fetch_stream(self._begin(channels[rank], rank, taken), channels[rank], pages, stream)
        except grpc.RpcError as error:
            failure = error_from_rpc(error)
            raise failure from None
        finally:
            stream.synchronize()
            if self._prefetch is not None:
                # After the last message this does nothing.
                self._prefetch.cancel()

    def _fetch_stream(self, messages: Any, channel: grpc.Channel, pages: PageSlots, stream: KvStream) -> None:
        try:
            self._receive(messages, expect_header(messages), channel, pages, stream)
        finally:
            messages.cancel()

    def _begin(self, channel: grpc.Channel, rank: int, taken: Prefetch | None) -> Any:
        """Return the messages of a rank of the producer, from a prefetch that was taken over or from the rank itself.

        Raises:
            CancelledError: the fetch was cancelled before.
        """
        with self._lock:
            if self._cancelled:
                raise CancelledError("the request ended while its KV was being fetched")
            if taken is not None:
                self._call = taken.stream(rank)
                return self._call
            # Where other ranks of this consumer take the prefetch, the producer knows the request by the same id.
            known = self.load if self._prefetch is None else self._prefetch.transfer
            self._call = begin_fetch(channel, fetch_request(self._consumer, known), self._timeout)
            return self._call

    def _receive(
        self,
        messages: Any,
        header: transfer_pb2.TransferHeader,
        channel: grpc.Channel,
        pages: PageSlots,
        stream: KvStream,
    ) -> None:
        """Take in what follows a stream's header.

        Raises:
            FailedPreconditionError: the stream is another one than was asked for.
            DataLossError: it is damaged, or stops before its end.
        """  # the reader and `chunks_until_end` raise the second
        heads = HeadRange(header.first_head, header.end_head)
        geometry = self._consumer.geometry.of_heads(heads)
        if header.tokens != self.load.tokens:
            raise FailedPreconditionError(
                f"the transfer has {header.tokens} tokens and the request expects {self.load.tokens}"
            )
        pages.stream(heads)
        reader = ChunkReader(geometry.layers, header.tokens)
        writer = SegmentWriter(self._decoder(header, heads, geometry, channel), pages)
        fetched = 0
        for message in chunks_until_end(messages):
            if isinstance(message, KvChunk):
                fetched += message.payload_bytes
                _write(reader.read(message), writer, pages, stream)
                continue
            fetched += message.ByteSize() + CHECKSUM_BYTES
            end = message.end
            reader.finish(ChunkTotals(end.chunks, end.payload_bytes, end.digest))
            with stream.working():
                pages.end_stream()
            self._tally.add("kv_bytes_fetched_total", header.codec.name, fetched)
            self._tally.add("kv_tokens_loaded_total", header.codec.name, header.tokens - self.load.skip)

    def _decoder(
        self, header: transfer_pb2.TransferHeader, heads: HeadRange, geometry: KvGeometry, channel: grpc.Channel
    ) -> Any:
        if header.codec.name not in codecs.names() or codecs.get(header.codec.name).version != header.codec.version:
            raise FailedPreconditionError(
                f"the producer sends codec {header.codec.name!r} version {header.codec.version}, unknown here; "
                "run the same release on both sides"
            )
        codec = codecs.get(header.codec.name)
        if not codec.needs_basis:
            return codec.decoder(geometry, None)
        digest = header.codec.basis_digest
        basis = self._bases.get(digest, heads, lambda: get_basis(channel, digest, self._timeout))
        return codec.decoder(geometry, basis)


def fetch_request(consumer: ConsumerRank, transfer: TransferRef) -> transfer_pb2.FetchRequest:
    """Return how a consuming worker asks a rank of the producer.

    Args:
        consumer: the worker.
        transfer: what it asks for.
    """
    return transfer_pb2.FetchRequest(
        transfer_id=transfer.transfer_id,
        request_id=transfer.request_id,
        model=consumer.spec.to_proto(),
        codecs=[kv_pb2.CodecId(name=name, version=codecs.get(name).version) for name in codecs],
        rank=consumer.rank,
        ranks=consumer.ranks,
    )


def _write(segments: Sequence[KvSegment], writer: SegmentWriter, pages: PageSlots, stream: KvStream) -> None:
    """Decode segments, and write the layers that are complete with them into their pages."""
    with stream.working():
        writer.write(segments)
        for segment in segments:
            pages.written(segment.layer, segment.tiers.numel())


def streams_needed(heads: HeadRange, ranks: int, kv_heads: int) -> list[int]:
    """Return the ranks of a producer whose streams together hold some KV heads, each head once.

    Args:
        heads: that are wanted.
        ranks: of the producer.
        kv_heads: of the model.

    Returns:
        Ranks, from 0.
    """
    missing, chosen = set(range(heads.first, heads.end)), []
    for rank in range(ranks):
        held = HeadRange.of_rank(rank, ranks, kv_heads)
        if missing & set(range(held.first, held.end)):
            missing -= set(range(held.first, held.end))
            chosen.append(rank)
    return chosen
