"""A synthetic prompt's KV through the product's own pipeline, stream and receiver."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any

import grpc
import torch
from prometheus_client import CollectorRegistry

from spectrumkv.bench.codec.measure import Cache
from spectrumkv.common.errors import DataLossError, InternalError, InvalidArgumentError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.base import KvEncoder, codecs, needed_basis
from spectrumkv.common.kv.codecs.tiered import TieredEncoder, tier_segments
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
from spectrumkv.prefill_server.transfer.pipeline import FirstToken, KvPipeline, SentKv
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.v1 import decode_pb2


class ReceivingServicer:
    """The receiving half of the decode service: admits, verifies, dequantizes into slots, and generates nothing.

    Args:
        pool: where KV goes.
        metrics: told of every byte, as in the service.
    """

    def __init__(self, pool: KvPool, metrics: Metrics) -> None:
        self._pool = pool
        self._metrics = metrics
        self._bases = BasisStore(pool.geometry)

    def Decode(  # noqa: N802  # gRPC's spelling
        self, requests: Iterator[ArrivedRequest], context: grpc.ServicerContext
    ) -> Iterator[decode_pb2.DecodeResponse]:
        """Answer Admitted, and Finished once all KV is in the slots and verified."""
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
        """Keep the basis that the cache is coded in."""
        self._bases.receive(request_iterator)
        return decode_pb2.PutBasisResponse()

    def GetServerInfo(  # noqa: N802  # gRPC's spelling
        self, request: decode_pb2.DecodeServiceGetServerInfoRequest, context: grpc.ServicerContext
    ) -> decode_pb2.DecodeServiceGetServerInfoResponse:
        """Tell the version and the slots."""
        return decode_pb2.DecodeServiceGetServerInfoResponse(
            version=version("spectrumkv"), slots_total=self._pool.slots, slots_used=self._pool.used
        )


@dataclass(frozen=True)
class Sending:
    """One transfer.

    Attributes:
        seconds: from the layers in memory until all of them lie verified in the slots.
        sent: what the pipeline counted.
    """

    seconds: float
    sent: SentKv


class KvSender:
    """Sends one synthetic prompt's KV over and over, each time on a Decode stream of its own.

    Args:
        channel: to a server with a `ReceivingServicer`.
        captures: what each layer shows.
        plan: how the KV is scored, tiered and coded.
        cache: whose layers the captures show.
        chunk_bytes: payload at which a chunk leaves.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        captures: list[LayerCapture],
        plan: KvPlan,
        cache: Cache,
        chunk_bytes: int,
    ) -> None:
        self._open: Any = open_decode_stream(channel)
        if plan.codec.needs_basis:
            begin_basis(channel, needed_basis(plan.codec, plan.basis), timeout=None)[0].result()
        self._observations = captures
        self._plan = plan
        self._geometry = cache.geometry
        self._begin = decode_pb2.Begin(
            request_id="0" * 32,
            codec=plan.codec_id,
            prompt_token_ids=[0] * cache.tokens,
        )
        self._chunk_bytes = chunk_bytes
        self._metrics = Metrics(CollectorRegistry())

    def send(self) -> Sending:
        """Send all layers at once, as fast as they are taken.

        Raises:
            SpectrumKVError: the receiver refused them.
        """
        pipeline = KvPipeline(self._begin, self._plan, self._geometry, self._chunk_bytes, self._metrics)
        call = self._open(pipeline.messages(), timeout=None)
        try:
            # Decode admits before prefill computes, so this is not part of the hand-off.
            _intact(next(call))
            started = time.perf_counter()
            for capture in self._observations:
                pipeline.put_layer(capture)
            pipeline.put_first_token(FirstToken(0, finished=False))
            _intact(next(call))
            sending = Sending(time.perf_counter() - started, pipeline.sent)
            # The slots are free for the next transfer when the stream has ended.
            for _ in call:
                raise InternalError("the receiver answered more than twice")
            return sending
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        finally:
            pipeline.cancel()
            call.cancel()


@dataclass(frozen=True)
class _SettledEncoder:
    """Codes layers at tiers that are known; see `KvEncoder`."""

    encoder: TieredEncoder
    tiers: tuple[torch.Tensor, ...]

    def encode(self, capture: LayerCapture) -> Iterator[KvSegment]:
        tiers = self.tiers[capture.layer]
        return tier_segments(self.encoder.codec, capture, tiers, self.encoder.geometry)


@dataclass(frozen=True)
class TieredPlan(KvPlan):
    """A plan whose tiers are settled.

    Attributes:
        tiers: of each layer's tokens, uint8 `[n]` per layer.
    """

    tiers: tuple[torch.Tensor, ...] = ()

    def encoder(self, geometry: KvGeometry, tokens: int, framing_bytes: int) -> KvEncoder:
        """See `KvPlan.encoder`."""
        return _SettledEncoder(_tiered_encoder(self, geometry, tokens), self.tiers)


def tiered(plan: KvPlan, layers: Sequence[LayerCapture], geometry: KvGeometry) -> TieredPlan:
    """Settle a plan's tiers, each layer's by its own scores.

    Args:
        plan: of a policy that gives tokens tiers.
        layers: what each layer shows.
        geometry: of the cache.
    """
    settled = {field.name: getattr(plan, field.name) for field in fields(plan)} | {"scope": "layer"}
    encoder = _tiered_encoder(KvPlan(**settled), geometry, layers[0].tokens)
    return TieredPlan(**settled, tiers=tuple(encoder.allocation.tiers(layer) for layer in layers))


def _tiered_encoder(plan: KvPlan, geometry: KvGeometry, tokens: int) -> TieredEncoder:
    encoder = KvPlan.encoder(plan, geometry, tokens, framing_bytes=0)
    if not isinstance(encoder, TieredEncoder):
        raise InternalError(f"policy {plan.policy.name!r} gives no tiers")
    return encoder


def captures(cache: Cache, query_heads: int, window: int) -> list[LayerCapture]:
    """What the layers of a cache show, with random queries.

    Args:
        cache: keys and values.
        query_heads: a multiple of the KV heads.
        window: how many of the last queries are shown.

    Raises:
        InvalidArgumentError: the heads or the window do not fit the cache.
    """
    geometry = cache.geometry
    if not 1 <= window <= cache.tokens:
        raise InvalidArgumentError(f"--window is {window}; allowed: 1 to --tokens, {cache.tokens}")
    generator = torch.Generator().manual_seed(2)
    shape = (query_heads, window, geometry.head_dim)
    return [
        LayerCapture(
            queries=torch.randn(shape, generator=generator).to(cache.device, geometry.native_dtype),
            keys=keys,
            values=values,
            scaling=geometry.head_dim**-0.5,
            softcap=None,
            sliding_window=None,
            layer=layer,
        )
        for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True))
    ]


def _expect(message: ArrivedRequest, kind: str) -> decode_pb2.DecodeRequest:
    if isinstance(message, DataLossError):
        raise message
    if isinstance(message, KvChunk) or message.WhichOneof("message") != kind:
        raise InvalidArgumentError(f"the stream has something else where {kind} was due")
    return message


def _intact(response: ArrivedResponse) -> None:
    if isinstance(response, DataLossError):
        raise response
