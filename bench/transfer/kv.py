"""Send a synthetic prompt's KV through the services' own pipeline, stream and receiver."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any

import grpc
import torch
from prometheus_client import CollectorRegistry

from spectrumkv.bench.models.synthetic_prompt import REQUEST_ID, SyntheticCache
from spectrumkv.common.errors import DataLossError, InternalError, InvalidArgumentError
from spectrumkv.common.kv.allocation import RankedTiers
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.base import KvEncoder, codecs, needed_basis
from spectrumkv.common.kv.codecs.segmentation import tier_segments
from spectrumkv.common.kv.codecs.tiered import TieredEncoder
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.common.rpc.decode_methods import begin_basis, open_decode_stream
from spectrumkv.common.rpc.decode_stream import ArrivedRequest, ArrivedResponse, serialized_bytes
from spectrumkv.common.rpc.status import error_from_rpc
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.decode_server.bases import BasisStore
from spectrumkv.decode_server.kv_pool import KvPool
from spectrumkv.decode_server.receiver import KvReceiver
from spectrumkv.prefill_server.transfer.pipeline import FirstToken, KvPipeline
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.transfer.sent_kv import SentKv
from spectrumkv.v1 import decode_pb2


class ReceivingServicer:
    """Serve the receiving half of the decode service: admit, verify and decode into the pool, but generate nothing.

    Args:
        pool: the pool that receives the KV.
        metrics: counts every byte, as in the service.
    """

    def __init__(self, pool: KvPool, metrics: Metrics) -> None:
        self._pool = pool
        self._metrics = metrics
        self._bases = BasisStore(pool.geometry)

    def Decode(  # noqa: N802  # gRPC's spelling
        self, requests: Iterator[ArrivedRequest], context: grpc.ServicerContext
    ) -> Iterator[decode_pb2.DecodeResponse]:
        """Receive the KV of one request.

        Yields:
            Admitted when the slots are reserved, and Finished when all KV is verified and in the pool.
        """
        begin = _expect(next(requests), "begin").begin
        tokens = len(begin.prompt_token_ids)
        codec = codecs.get(begin.codec.name)
        basis = self._bases.get(begin.codec.basis_digest) if codec.needs_basis else None
        decoder = codec.decoder(self._pool.geometry, basis)
        with self._pool.reserve(tokens) as allocation:
            yield decode_pb2.DecodeResponse(admitted=decode_pb2.Admitted(slots=allocation.capacity))
            with KvReceiver(self._pool, allocation, decoder, tokens, self._metrics) as receiver:
                for message in requests:
                    if isinstance(message, KvChunk):
                        receiver.accept(message, serialized_bytes(message))
                        continue
                    receiver.finish(_expect(message, "end").end)
                    yield decode_pb2.DecodeResponse(finished=decode_pb2.DecodeFinished())

    def PutBasis(  # noqa: N802  # gRPC's spelling
        self, request_iterator: Iterator[decode_pb2.PutBasisRequest], context: grpc.ServicerContext
    ) -> decode_pb2.PutBasisResponse:
        """Return an empty answer after keeping the basis that the cache is encoded with."""
        self._bases.receive(request_iterator)
        return decode_pb2.PutBasisResponse()

    def GetServerInfo(  # noqa: N802  # gRPC's spelling
        self, request: decode_pb2.DecodeServiceGetServerInfoRequest, context: grpc.ServicerContext
    ) -> decode_pb2.DecodeServiceGetServerInfoResponse:
        """Return the version and the slots."""
        return decode_pb2.DecodeServiceGetServerInfoResponse(
            version=version("spectrumkv"), slots_total=self._pool.slots, slots_used=self._pool.used
        )


@dataclass(frozen=True)
class Sending:
    """Measure one transfer.

    Attributes:
        seconds: from the layers in memory until all of their KV is verified and in the pool.
        sent: what the pipeline counted.
    """

    seconds: float
    sent: SentKv


class KvSender:
    """Send one synthetic prompt's KV repeatedly, each time on a new Decode stream.

    Args:
        channel: the connection to a server with a `ReceivingServicer`.
        captures: what each layer of the cache shows.
        plan: how the KV is scored, tiered and encoded.
        cache: the cache.
        chunk_bytes: payload bytes at which a chunk is sent.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        captures: list[LayerCapture],
        plan: KvPlan,
        cache: SyntheticCache,
        chunk_bytes: int,
    ) -> None:
        self._channel = channel
        self._open: Any = open_decode_stream(channel)
        self._captures = captures
        self._plan = plan
        self._geometry = cache.geometry
        self._begin = decode_pb2.Begin(
            request_id=REQUEST_ID,
            codec=plan.codec_id,
            prompt_token_ids=[0] * cache.tokens,
        )
        self._chunk_bytes = chunk_bytes
        self._metrics = Metrics(CollectorRegistry())

    def put_basis(self) -> None:
        """Send the plan's basis to the receiver if the codec needs one; call this once before `send`."""
        if self._plan.codec.needs_basis:
            basis = needed_basis(self._plan.codec, self._plan.basis)
            begin_basis(self._channel, basis, timeout=None)[0].result()

    def send(self) -> Sending:
        """Send all layers as fast as the receiver takes them.

        Returns:
            The time of the transfer and what was sent.

        Raises:
            InternalError: the receiver breaks the protocol.
            SpectrumKVError: the receiver refused the KV.
        """  # noqa: DOC501  # the rule wants `error_from_rpc` itself; it makes a SpectrumKVError
        pipeline = KvPipeline(self._begin, self._plan, self._geometry, self._chunk_bytes, self._metrics)
        call = self._open(pipeline.messages(), timeout=None)
        try:
            # Decode admits a request before prefill computes, so the wait for it is not part of the hand-off.
            _intact(next(call))
            started = time.perf_counter()
            for capture in self._captures:
                pipeline.put_layer(capture)
            pipeline.put_first_tokens(FirstToken(0, finished=False))
            _intact(next(call))
            sending = Sending(time.perf_counter() - started, pipeline.sent)
            # The pool is free for the next transfer when the stream has ended.
            for _ in call:
                raise InternalError("the receiver answered more than twice")
            return sending
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        finally:
            pipeline.cancel()
            call.cancel()


@dataclass(frozen=True)
class _KnownTiersEncoder:
    """Encode layers at tiers that are known; see `KvEncoder`."""

    encoder: TieredEncoder
    tiers: tuple[torch.Tensor, ...]

    def encode(self, capture: LayerCapture) -> Iterator[KvSegment]:
        tiers = self.tiers[capture.layer]
        return tier_segments(self.encoder.codec, capture, tiers, self.encoder.geometry)


@dataclass(frozen=True)
class TieredPlan(KvPlan):
    """Describe a plan whose tiers are known before the transfer.

    Attributes:
        tiers: the tiers of each layer's tokens, uint8 `[n]` per layer.
    """

    tiers: tuple[torch.Tensor, ...] = ()

    def encoder(self, geometry: KvGeometry, tokens: int, framing_bytes: int) -> KvEncoder:
        """Return an encoder that asks no policy; see `KvPlan.encoder`."""
        return _KnownTiersEncoder(_tiered_encoder(self, geometry, tokens), self.tiers)


def tiered(plan: KvPlan, layers: Sequence[LayerCapture], geometry: KvGeometry) -> TieredPlan:
    """Return a plan with the tiers that each layer's own scores give.

    Args:
        plan: a plan whose policy gives tokens tiers.
        layers: what each layer shows.
        geometry: the geometry of the cache.
    """
    values = {field.name: getattr(plan, field.name) for field in fields(plan)} | {"scope": "layer"}
    encoder = _tiered_encoder(KvPlan(**values), geometry, layers[0].tokens)
    allotted = (encoder.allocation.tiers(layer) for layer in layers)
    return TieredPlan(
        **values, tiers=tuple(one.on_host() if isinstance(one, RankedTiers) else one for one in allotted)
    )


def _tiered_encoder(plan: KvPlan, geometry: KvGeometry, tokens: int) -> TieredEncoder:
    encoder = KvPlan.encoder(plan, geometry, tokens, framing_bytes=0)
    if not isinstance(encoder, TieredEncoder):
        raise InternalError(f"policy {plan.policy.name!r} gives no tiers")
    return encoder


def _expect(message: ArrivedRequest, kind: str) -> decode_pb2.DecodeRequest:
    if isinstance(message, DataLossError):
        raise message
    if isinstance(message, KvChunk) or message.WhichOneof("message") != kind:
        raise InvalidArgumentError(f"the stream has another message where {kind} was due")
    return message


def _intact(response: ArrivedResponse) -> None:
    if isinstance(response, DataLossError):
        raise response
