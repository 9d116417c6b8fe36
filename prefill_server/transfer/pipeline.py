"""Turns layers that the model just computed into messages on the stream: score, tier, encode, pack."""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from spectrumkv.common.concurrency.cuda_stream import KvStream, record_event
from spectrumkv.common.concurrency.prefetch_iterator import PrefetchIterator
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.tiers import Tier, count_tiers
from spectrumkv.common.kv.wire import ChunkTotals, ChunkWriter, KvChunk
from spectrumkv.common.liveness.vitals import Vitals
from spectrumkv.common.rpc.decode_stream import Request, serialized_bytes
from spectrumkv.common.telemetry.metrics import FRAMING, Metrics
from spectrumkv.prefill_server.transfer.coding_clock import CodingClock, GpuCodingClock
from spectrumkv.prefill_server.transfer.kv_map import KvMap
from spectrumkv.prefill_server.transfer.kv_memory import KvReservation
from spectrumkv.prefill_server.transfer.layer_queue import LayerQueue
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.transfer.sent_kv import SentKv
from spectrumkv.v1 import decode_pb2

# A message and the segments in it.
Outgoing = tuple[Request, Sequence[KvSegment]]

# Most bytes that a chunk takes besides its payload, and that End takes.
CHUNK_ENVELOPE_BYTES = 24
END_BYTES = 80
# Most bytes that one more first token adds to End.
FIRST_TOKEN_BYTES = 10
# Bytes set aside for the request's id, so that its length does not change the budget; only longer ids are measured.
REQUEST_ID_BYTES = 128
# Least payload of a chunk where no layer waits: a message costs about as much time as this many bytes of payload.
IDLE_CHUNK_BYTES = 64 << 10
# How many messages may wait for gRPC where they are made ahead: about as many as a layer takes.
MESSAGES_AHEAD = 8
CPU = torch.device("cpu")


@dataclass(frozen=True)
class FirstToken:
    """Holds a token that prefill sampled: the first one of an answer.

    Attributes:
        token_id: the token.
        finished: whether the answer ends with this token.
    """

    token_id: int
    finished: bool


class KvPipeline:
    """Makes the outgoing half of a Decode stream.

    The model's thread calls `put_layer`; gRPC's thread iterates `messages` and so scores, tiers and encodes as fast
    as the network takes the chunks. A slow link holds up this thread only: the layers wait in memory where the model
    left them. On a GPU, where layers come faster than one thread codes and sends them, coding has a thread of its
    own, a few messages ahead.

    Args:
        begin: the message that opens the stream.
        plan: how the KV is scored, tiered and coded.
        geometry: shape and dtype of the model's cache.
        chunk_bytes: payload at which a chunk leaves; a smaller chunk leaves where no layer waits.
        metrics: counts every byte.
        device: where the layers are.
        memory: for the prompt's KV, which is held; released once all has left. None where it is not bounded.
        vitals: have a pulse of the thread that codes; where it stands still, the process ends.
        kv_map: takes in every segment; None where nobody asks for it.

    Attributes:
        plan: how the KV is scored, tiered and coded.
        vocab_size: of the model whose KV it is.
        sent: what left so far.
        kv_map: of what left; None where nobody asks for it.
        first_tokens: what prefill sampled, one for each answer; empty before it did.
        failure: why `messages` ended with an error, if it did.

    Raises:
        InvalidArgumentError: the codec cannot keep to the budget.
    """

    def __init__(
        self,
        begin: decode_pb2.Begin,
        plan: KvPlan,
        geometry: KvGeometry,
        chunk_bytes: int,
        metrics: Metrics,
        device: torch.device = CPU,
        memory: KvReservation | None = None,
        vitals: Vitals | None = None,
        kv_map: KvMap | None = None,
    ) -> None:
        self._memory = memory
        self.kv_map = kv_map
        self.sent = SentKv(coded_ahead=device.type == "cuda")
        self.first_tokens: tuple[FirstToken, ...] = ()
        self.failure: Exception | None = None
        self._layers = LayerQueue(geometry, metrics.kv_bytes_resident)
        self._coding = threading.Lock()
        self._vitals = vitals or Vitals()
        self._stream = KvStream(device)
        self._coding_clock = GpuCodingClock(self._stream) if self.sent.coded_ahead else CodingClock()
        self._ahead: PrefetchIterator[Outgoing] | None = None
        self._begin = begin
        self.plan = plan
        self.vocab_size = begin.model.vocab_size
        self._geometry = geometry
        self._writer = ChunkWriter(chunk_bytes)
        self._worth_a_chunk = min(chunk_bytes, IDLE_CHUNK_BYTES)
        # Looking a label up costs more than counting, and every layer counts.
        self._tokens_of = {tier: metrics.kv_tokens.labels(tier.label) for tier in Tier}
        self._bytes_of = {tier: metrics.kv_bytes_sent.labels(tier.label) for tier in Tier}
        self._framing_bytes = metrics.kv_bytes_sent.labels(FRAMING)
        self._fp16_equivalent_bytes = metrics.kv_fp16_equivalent_bytes
        tokens = len(begin.prompt_token_ids)
        chunks = 1 + int(plan.budget.value * geometry.fp16_bytes(tokens)) // self._worth_a_chunk
        end = END_BYTES + FIRST_TOKEN_BYTES * (max(1, begin.sampling.n) - 1)
        framing = _most_begin_bytes(begin) + chunks * CHUNK_ENVELOPE_BYTES + end
        self._encoder = plan.encoder(geometry, tokens, framing)

    def put_layer(self, capture: LayerCapture) -> None:
        """Take a layer from the model.

        Args:
            capture: the layer's queries, keys and values, or those of the newest chunk.

        Raises:
            CancelledError: the stream is over; the rest of the pass would be wasted.
        """
        computed = record_event(capture.keys)
        self._layers.put_layer(replace(capture, computed=computed))

    def put_first_tokens(self, *first: FirstToken) -> None:
        """Take the first token of each answer, once every layer has been put."""
        self.first_tokens = first
        self._layers.end()

    def cancel(self) -> None:
        """End `messages`, and have the model's pass end at its next layer."""
        self._layers.close()
        if self._ahead is not None:
            self._ahead.close()

    def wait_until_idle(self) -> None:
        """Wait, after `cancel`, for the segment that is being coded, so that nothing is computed afterwards.

        The thread that codes is a daemon, and a process that ends while a daemon runs compiled code is aborted.
        """
        with self._coding:
            pass

    def messages(self) -> Iterator[Request]:
        """Make the messages while layers arrive.

        Yields:
            Begin, then chunks, then End; fewer once the pipeline is cancelled.

        Raises:
            SpectrumKVError: the KV cannot be coded. gRPC ends the stream without saying why; `failure` keeps the
                error.
        """
        try:
            for message, segments in self._made():
                self._account(message, segments)
                handed_over = time.monotonic()
                yield message
                now = time.monotonic()
                self.sent.link_seconds += now - handed_over
                if isinstance(message, decode_pb2.DecodeRequest) and message.HasField("end"):
                    self.sent.ended_at = now
                    if self._memory is not None:
                        self._memory.release()
        except Exception as error:
            self.failure = error
            raise

    def _made(self) -> Iterable[Outgoing]:
        if not self.sent.coded_ahead:
            return self._messages()
        self._ahead = PrefetchIterator(self._messages(), MESSAGES_AHEAD, "kv-coding")
        if self._layers.closed:
            self._ahead.close()
        return self._ahead

    def _messages(self) -> Iterator[Outgoing]:
        yield decode_pb2.DecodeRequest(begin=self._begin), ()
        for capture in self._layers.layers():
            for segment in self._encode(capture):
                yield from self._writer.add(segment)
            if self._layers.empty and self._writer.pending_bytes >= self._worth_a_chunk:
                yield from self._writer.flush()
        if not self.first_tokens or not self._layers.complete:
            return
        yield from self._writer.flush()
        end = _end_message(self.first_tokens, self._writer.totals())
        yield decode_pb2.DecodeRequest(end=end), ()

    def _encode(self, capture: LayerCapture) -> Iterator[KvSegment]:
        """Yield the segments that are complete with this layer, and count them and the time that coding takes."""
        segments = self._encoder.encode(capture)
        states = (capture.queries, capture.keys, capture.values)
        while True:
            with (
                self._coding_clock.coding(capture.computed),
                self._coding,
                self._vitals.working(),
                self._stream.working(capture.computed, states),
            ):
                segment = None if self._layers.closed else next(segments, None)
            self.sent.encode_seconds, self.sent.coder_seconds = (
                self._coding_clock.seconds,
                self._coding_clock.coder_seconds,
            )
            if segment is None:
                return
            self._count(segment)
            if self.kv_map is not None:
                self.kv_map.add(segment)
            yield segment

    def _count(self, segment: KvSegment) -> None:
        self._fp16_equivalent_bytes.inc(self._geometry.fp16_bytes_per_layer(segment.tiers.numel()))
        for tier, tokens in count_tiers(segment.tiers).items():
            self.sent.tier_tokens[tier] += tokens
            self._tokens_of[tier].inc(tokens / self._geometry.layers)

    def _account(self, message: Request, segments: Sequence[KvSegment]) -> None:
        """Count a message as it leaves: codes and scales of its segments by tier, the rest as framing."""
        if isinstance(message, KvChunk) and self.sent.first_chunk_at is None:
            self.sent.first_chunk_at = time.monotonic()
        framing = serialized_bytes(message)
        self.sent.message_bytes += framing
        for segment in segments:
            for tier, size in segment.tier_bytes.items():
                self.sent.tier_bytes[tier] += size
                self._bytes_of[tier].inc(size)
                framing -= size
        self._framing_bytes.inc(framing)


def _most_begin_bytes(begin: decode_pb2.Begin) -> int:
    """Return the most bytes that Begin may take, for any request id and any seed.

    Id and seed differ between requests that are otherwise equal, and equal requests must get the same KV.
    """
    largest = decode_pb2.Begin()
    largest.CopyFrom(begin)
    largest.sampling.seed = 2**64 - 1
    largest.request_id += " " * (REQUEST_ID_BYTES - len(begin.request_id.encode()))
    return serialized_bytes(decode_pb2.DecodeRequest(begin=largest))


def _end_message(first: Sequence[FirstToken], totals: ChunkTotals) -> decode_pb2.End:
    return decode_pb2.End(
        first_token_id=first[0].token_id,
        finished=first[0].finished,
        other_first_tokens=[decode_pb2.FirstToken(token_id=one.token_id, finished=one.finished) for one in first[1:]],
        chunks=totals.chunks,
        payload_bytes=totals.payload_bytes,
        digest=totals.digest,
    )
