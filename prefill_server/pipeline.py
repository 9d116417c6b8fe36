"""From layers that the model just computed to messages on the stream: score, tier, encode, pack."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from spectrumkv.common.decode_stream import Request, serialized_bytes
from spectrumkv.common.kv.block import MAX_CHUNK_PAYLOAD_BYTES, Block
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.scoring import Observation
from spectrumkv.common.kv.tiers import Tier, count_tiers
from spectrumkv.common.kv.wire import Chunk, ChunkTotals, ChunkWriter
from spectrumkv.common.metrics import FRAMING, Metrics
from spectrumkv.prefill_server.layer_queue import LayerQueue
from spectrumkv.prefill_server.plan import KvPlan
from spectrumkv.v1 import decode_pb2

T = TypeVar("T")
R = TypeVar("R", bound=Request)

# Of a chunk's payload, what block headers and tier maps may take.
BLOCK_OVERHEAD_BYTES = 64 << 10
# What is worth a chunk of its own where no layer waits: a message costs about as much as this many bytes of payload.
IDLE_CHUNK_BYTES = 64 << 10


@dataclass
class SentKv:
    """What left for decode so far.

    Attributes:
        message_bytes: all serialized messages: Begin, chunks, End.
        tier_bytes: codes and scales by tier.
        tier_tokens: token-layers by tier.
        encode_seconds: time spent on scoring, tiering and encoding.
        first_chunk_at: monotonic time of the first chunk; None before it.
        ended_at: monotonic time of End; None before it.
    """

    message_bytes: int = 0
    tier_bytes: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    tier_tokens: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    encode_seconds: float = 0.0
    first_chunk_at: float | None = None
    ended_at: float | None = None

    @property
    def transfer_seconds(self) -> float:
        """First chunk to End; 0 where there was no chunk or no End."""
        if self.first_chunk_at is None or self.ended_at is None:
            return 0.0
        return self.ended_at - self.first_chunk_at

    def log_fields(self) -> dict[str, int | float]:
        """What the request's log line says of it."""
        return {
            "kv_bytes": self.message_bytes,
            "encode_seconds": self.encode_seconds,
            "transfer_seconds": self.transfer_seconds,
        }


@dataclass(frozen=True)
class FirstToken:
    """The token that prefill sampled; after it no layer follows.

    Attributes:
        token_id: the token.
        finished: whether it already ended the generation.
    """

    token_id: int
    finished: bool


class KvPipeline:
    """The outgoing half of a Decode stream.

    The model's thread calls `put_layer`; gRPC's thread iterates `messages` and so scores, tiers and encodes at
    the pace at which the network takes the chunks. A slow link holds up this thread only: the layers wait in
    memory where the model left them.

    Args:
        begin: opens the stream.
        plan: how the KV is scored, tiered and coded.
        geometry: shape and dtype of the model's cache.
        chunk_bytes: payload at which a chunk leaves; a smaller one does where no layer waits.
        metrics: told of every byte.

    Attributes:
        sent: what left so far.
        first_token: what prefill sampled; None before it did.
        failure: why `messages` ended with an error, if it did.
    """

    def __init__(
        self,
        begin: decode_pb2.Begin,
        plan: KvPlan,
        geometry: KvGeometry,
        chunk_bytes: int,
        metrics: Metrics,
    ) -> None:
        self.sent = SentKv()
        self.first_token: FirstToken | None = None
        self.failure: Exception | None = None
        self._layers = LayerQueue(geometry, metrics.kv_bytes_resident)
        self._begin = begin
        self._plan = plan
        self._geometry = geometry
        self._writer = ChunkWriter(chunk_bytes)
        self._worth_a_chunk = min(chunk_bytes, IDLE_CHUNK_BYTES)
        self._metrics = metrics
        self._block_tokens = max(
            1, (MAX_CHUNK_PAYLOAD_BYTES - BLOCK_OVERHEAD_BYTES) // geometry.native_bytes_per_token_layer
        )

    def put_layer(self, observation: Observation) -> None:
        """Take a layer from the model.

        Raises:
            CancelledError: the stream is over; there is no use in computing on.
        """
        self._layers.put_layer(replace(observation, seed=self._plan.seed))

    def put_first_token(self, first: FirstToken) -> None:
        """Take the first token; every layer has been put before."""
        self.first_token = first
        self._layers.end()

    def cancel(self) -> None:
        """End `messages`, and the model's pass at its next layer."""
        self._layers.close()

    def messages(self) -> Iterator[Request]:
        """Yield Begin, then chunks as layers arrive, then End; stop short when cancelled.

        Raises:
            SpectrumKVError: the KV cannot be coded. gRPC ends the stream without a word of why; `failure` keeps it.
        """
        try:
            yield from self._messages()
        except Exception as error:
            self.failure = error
            raise

    def _messages(self) -> Iterator[Request]:
        yield self._account(decode_pb2.DecodeRequest(begin=self._begin))
        for observation, tiers in self._tiered_layers():
            for block in self._encode(observation, tiers):
                yield from self._chunk_messages(self._writer.add(block))
            if self._layers.empty and self._writer.pending_bytes >= self._worth_a_chunk:
                yield from self._chunk_messages(self._writer.flush())
        if self.first_token is None or not self._layers.complete:
            return
        yield from self._chunk_messages(self._writer.flush())
        end = _end_message(self.first_token, self._writer.totals())
        yield self._account(decode_pb2.DecodeRequest(end=end))
        self.sent.ended_at = time.monotonic()

    def _tiered_layers(self) -> Iterator[tuple[Observation, torch.Tensor]]:
        """Yield each layer with its tokens' tiers: at once, or after the last layer where all must agree."""
        if self._plan.scope == "layer":
            for layer in self._layers.layers():
                yield layer, self._timed(self._plan.tiers_of, layer)
        else:
            layers = list(self._layers.layers())
            if len(layers) == self._geometry.layers:
                tiers = self._timed(self._plan.tiers_for_model, layers)
                yield from ((layer, tiers) for layer in layers)

    def _encode(self, observation: Observation, tiers: torch.Tensor) -> Iterator[Block]:
        """Yield a layer's tokens as blocks."""
        self._metrics.kv_fp16_equivalent_bytes.inc(self._geometry.fp16_bytes_per_layer(tiers.numel()))
        for tier, tokens in count_tiers(tiers).items():
            self.sent.tier_tokens[tier] += tokens
            self._metrics.kv_tokens.labels(tier.label).inc(tokens / self._geometry.layers)
        for first in range(0, tiers.numel(), self._block_tokens):
            span = slice(first, first + self._block_tokens)
            encoded = self._timed(
                self._plan.codec.encode,
                observation.keys[:, span],
                observation.values[:, span],
                tiers[span],
                self._geometry,
            )
            yield Block(observation.layer, first, tiers[span], encoded.body, encoded.tier_bytes)

    def _timed(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do some of the encoding, on the clock."""
        started = time.monotonic()
        try:
            return work(*arguments)
        finally:
            self.sent.encode_seconds += time.monotonic() - started

    def _chunk_messages(self, chunks: Iterator[tuple[Chunk, list[Block]]]) -> Iterator[Chunk]:
        for chunk, blocks in chunks:
            if self.sent.first_chunk_at is None:
                self.sent.first_chunk_at = time.monotonic()
            yield self._account(chunk, blocks)

    def _account(self, message: R, blocks: Sequence[Block] = ()) -> R:
        """Count a message as it leaves: its blocks' codes and scales by tier, the rest as framing."""
        framing = serialized_bytes(message)
        self.sent.message_bytes += framing
        for block in blocks:
            for tier, size in block.tier_bytes.items():
                self.sent.tier_bytes[tier] += size
                self._metrics.kv_bytes_sent.labels(tier.label).inc(size)
                framing -= size
        self._metrics.kv_bytes_sent.labels(FRAMING).inc(framing)
        return message


def _end_message(first: FirstToken, totals: ChunkTotals) -> decode_pb2.End:
    return decode_pb2.End(
        first_token_id=first.token_id,
        chunks=totals.chunks,
        payload_bytes=totals.payload_bytes,
        digest=totals.digest,
        finished=first.finished,
    )
