"""The gRPC face of decode: one stream is one request, and the lease on everything that it holds."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import grpc

from spectrumkv.common.concurrency.prefetch_iterator import PrefetchIterator
from spectrumkv.common.errors import CancelledError, DataLossError, InvalidArgumentError
from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.generation.prompt import check_length
from spectrumkv.common.generation.sampling import Sampler
from spectrumkv.common.generation.text import TextStream, token_message
from spectrumkv.common.kv.codecs.base import SegmentDecoder, codecs
from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.model.spec import ModelSpec
from spectrumkv.common.rpc.decode_stream import ArrivedPiece, ArrivedRequest, Request, serialized_bytes
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.common.service.config import DecodeConfig
from spectrumkv.common.telemetry.metrics import BASIS, FRAMING, Metrics
from spectrumkv.common.telemetry.request_log import check_request_id, current_request
from spectrumkv.decode_server.arrivals import expect_nothing, kind_of, received, throttled
from spectrumkv.decode_server.bases import BasisStore
from spectrumkv.decode_server.compatibility import check_same_codec, check_same_model
from spectrumkv.decode_server.engine import DecodeEngine, Sequence
from spectrumkv.decode_server.kv_pool import Allocation, KvPool
from spectrumkv.decode_server.receiver import KvReceiver
from spectrumkv.v1 import decode_pb2, decode_pb2_grpc, kv_pb2

# Prefill opens a stream with Begin. Who opens one and says nothing holds a thread for no longer than this.
BEGIN_SECONDS = 10.0
# How many messages may wait to be dequantized on a GPU.
MESSAGES_AHEAD = 8
# A basis has up to a few hundred megabytes.
PUT_BASIS_SECONDS = 120.0


class DecodeService(decode_pb2_grpc.DecodeServiceServicer):
    """Generates from a KV cache that prefill sends.

    Args:
        loaded: the model.
        config: the service's options.
        metrics: the process's metrics.
    """

    def __init__(self, loaded: LoadedModel, config: DecodeConfig, metrics: Metrics) -> None:
        self._loaded = loaded
        self._config = config
        self._metrics = metrics
        self._pool = KvPool(loaded.geometry, config.kv_memory, loaded.device, metrics)
        self._engine = DecodeEngine(loaded, self._pool, config.max_running)
        self._bases = BasisStore(loaded.geometry)
        metrics.requests_running.set_function(lambda: self._engine.running)
        metrics.requests_waiting.set_function(lambda: self._engine.waiting)

    def Decode(  # noqa: N802  # gRPC's spelling
        self, requests: Iterator[ArrivedRequest], context: grpc.ServicerContext
    ) -> Iterator[decode_pb2.DecodeResponse]:
        """Serve one request: admit, receive its KV, generate. Leaving this function frees what it held."""
        with (
            RpcScope(context, self._config.deadline) as scope,
            self._rejections_counted(),
            self._arriving(received(requests, scope)) as messages,
        ):
            with scope.within(BEGIN_SECONDS):
                begin = self._read_begin(messages)
            decoder = self._decoder(begin)
            with self._reserve(begin) as allocation:
                yield _admitted(allocation)
                end = self._receive_kv(decoder, begin, messages, allocation)
                if not end.finished:
                    yield from self._generate(begin, end, allocation, scope)

    def PutBasis(  # noqa: N802  # gRPC's spelling
        self, request_iterator: Iterator[ArrivedPiece], context: grpc.ServicerContext
    ) -> decode_pb2.PutBasisResponse:
        """Keep the basis that a prefill worker codes in."""
        with RpcScope(context, self._config.deadline) as scope, self._rejections_counted():
            try:
                with scope.within(PUT_BASIS_SECONDS):
                    received_bytes = self._bases.receive(request_iterator)
            except grpc.RpcError:
                scope.check()
                raise CancelledError("the basis broke off while it was sent") from None
            self._metrics.kv_bytes_received.labels(BASIS).inc(received_bytes)
        return decode_pb2.PutBasisResponse()

    def GetServerInfo(  # noqa: N802  # gRPC's spelling
        self, request: decode_pb2.DecodeServiceGetServerInfoRequest, context: grpc.ServicerContext
    ) -> decode_pb2.DecodeServiceGetServerInfoResponse:
        """Tell what is served and how full this worker is."""
        return decode_pb2.DecodeServiceGetServerInfoResponse(
            version=version("spectrumkv"),
            model_name=self._loaded.name,
            model=self._loaded.spec.to_proto(),
            codecs=[kv_pb2.CodecId(name=name, version=codecs.get(name).version) for name in codecs],
            device=str(self._loaded.device),
            slots_total=self._pool.slots,
            slots_used=self._pool.used,
            requests_running=self._engine.running,
        )

    def stop(self) -> None:
        """End the engine; call after the server has drained."""
        self._engine.stop()

    @contextmanager
    def _arriving(self, messages: Iterator[Request]) -> Iterator[Iterator[Request]]:
        """The messages.

        On a CPU they give way to running streams; on a GPU the next ones arrive while one is verified and
        dequantized.
        """
        if self._loaded.device.type == "cpu":
            yield throttled(messages, self._engine.wait_until_idle)
            return
        ahead = PrefetchIterator(messages, MESSAGES_AHEAD, "kv-arrival")
        try:
            yield iter(ahead)
        finally:
            ahead.close()

    @contextmanager
    def _rejections_counted(self) -> Iterator[None]:
        """Count what arrives damaged, by what was wrong."""
        try:
            yield
        except DataLossError as error:
            self._metrics.chunks_rejected.labels(error.reason).inc()
            raise

    def _read_begin(self, messages: Iterator[Request]) -> decode_pb2.Begin:
        """Return Begin if this worker can serve it.

        Raises:
            InvalidArgumentError: Begin asks for what nobody can serve.
            DataLossError: the stream starts with something else, or Begin is damaged.
            FailedPreconditionError: model or codec differ.
        """
        message = next(messages)
        if isinstance(message, KvChunk) or message.WhichOneof("message") != "begin":
            raise DataLossError(f"a Decode stream starts with Begin, not with {kind_of(message)}", "sequence")
        begin, size = message.begin, serialized_bytes(message)
        check_request_id(begin.request_id)
        current_request().note(
            request_id=begin.request_id,
            prompt_tokens=len(begin.prompt_token_ids),
            kv_bytes=size,
        )
        check_same_model(self._loaded.spec, ModelSpec.from_proto(begin.model))
        check_same_codec(begin.codec)
        if not begin.prompt_token_ids:
            raise InvalidArgumentError("Begin has no prompt tokens")
        self._check_token("Begin has", max(begin.prompt_token_ids))
        self._metrics.kv_bytes_received.labels(FRAMING).inc(size)
        return begin

    def _check_token(self, who: str, token_id: int) -> None:
        """Refuse a token that the model does not have: on a GPU it would end the process, not just the request."""
        vocab_size = self._loaded.spec.vocab_size
        if token_id >= vocab_size:
            raise InvalidArgumentError(f"{who} token id {token_id}; the vocabulary has {vocab_size}")

    def _decoder(self, begin: decode_pb2.Begin) -> SegmentDecoder:
        """Return what decodes the codec of Begin.

        Raises:
            BasisMissingError: the codec's basis has not been sent yet.
        """
        codec = codecs.get(begin.codec.name)
        basis = self._bases.get(begin.codec.basis_digest) if codec.needs_basis else None
        return codec.decoder(self._loaded.geometry, basis)

    def _reserve(self, begin: decode_pb2.Begin) -> Allocation:
        params = SamplingParams.from_proto(begin.sampling)
        prompt_tokens = len(begin.prompt_token_ids)
        check_length(prompt_tokens, params.max_tokens, self._loaded.context_length)
        return self._pool.reserve(prompt_tokens + params.max_tokens)

    def _receive_kv(
        self,
        decoder: SegmentDecoder,
        begin: decode_pb2.Begin,
        messages: Iterator[Request],
        allocation: Allocation,
    ) -> decode_pb2.End:
        """Write all KV into the slots as it arrives; return End once everything is verified.

        Raises:
            DataLossError: something is damaged, missing, or out of order.
        """
        record, started_at = current_request(), time.monotonic()
        record.begin_stage("receive", started_at)
        tokens = len(begin.prompt_token_ids)
        with KvReceiver(self._pool, allocation, decoder, tokens, self._metrics) as receiver:
            for message in messages:
                size = serialized_bytes(message)
                record.add(kv_bytes=size)
                record.note(receive_seconds=time.monotonic() - started_at)
                if isinstance(message, KvChunk):
                    receiver.accept(message, size)
                    continue
                if message.WhichOneof("message") != "end":
                    raise DataLossError(f"a Decode stream has {kind_of(message)} where KV was due", "sequence")
                self._metrics.kv_bytes_received.labels(FRAMING).inc(size)
                if not message.end.finished:
                    receiver.finish(message.end)
                    self._check_token("End has the first", message.end.first_token_id)
                expect_nothing(messages)
                return message.end
        raise AssertionError("`received` ends with End or an error")

    def _generate(
        self, begin: decode_pb2.Begin, end: decode_pb2.End, allocation: Allocation, scope: RpcScope
    ) -> Iterator[decode_pb2.DecodeResponse]:
        """Yield tokens from the second on, then Finished."""
        params = SamplingParams.from_proto(begin.sampling)
        sampler = Sampler(params, begin.prompt_token_ids)
        sampler.observe(end.first_token_id)
        text = TextStream(self._loaded.tokenizer, params, self._loaded.eos_token_ids)
        if text.push(end.first_token_id).finish is not None:
            raise InvalidArgumentError(
                f"the first token, {end.first_token_id}, ends the generation, and End does not say `finished`"
            )
        sequence = Sequence(
            allocation=allocation,
            prompt_tokens=len(begin.prompt_token_ids),
            length=len(begin.prompt_token_ids),
            index=0,
            last_token=end.first_token_id,
            sampler=sampler,
            text=text,
        )
        joined_at = time.monotonic()
        current_request().begin_stage("decode", joined_at)
        current_request().at_end(
            # Token 0 is prefill's own.
            lambda: {"completion_tokens": sequence.index, "decode_seconds": time.monotonic() - joined_at}
        )
        with self._metrics.request_duration.labels("decode").time():
            previous_at: float | None = None
            for token in self._engine.generate(sequence, scope):
                now = time.monotonic()
                if previous_at is not None:
                    self._metrics.inter_token_latency.observe(now - previous_at)
                previous_at = now
                yield decode_pb2.DecodeResponse(token=token_message(token.index, token.sampled, token.text))
                if token.finish is not None:
                    recomputed = sequence.recomputed_prompt_tokens
                    self._metrics.prompt_tokens_recomputed.inc(recomputed)
                    yield decode_pb2.DecodeResponse(
                        finished=decode_pb2.DecodeFinished(
                            finish_reason=token.finish.to_proto(),
                            recomputed_prompt_tokens=recomputed,
                            tokens=token.index,
                        )
                    )


def _admitted(allocation: Allocation) -> decode_pb2.DecodeResponse:
    return decode_pb2.DecodeResponse(admitted=decode_pb2.Admitted(slots=allocation.capacity))
