"""The gRPC face of decode: one stream is one request, and the lease on everything that it holds."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version

import grpc

from spectrumkv.common.concurrency.cuda_stream import is_device_lost
from spectrumkv.common.concurrency.prefetch_iterator import PrefetchIterator
from spectrumkv.common.errors import CancelledError, DataLossError, UnavailableError
from spectrumkv.common.generation.text import token_message
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.codecs.fixed_rate.kernel_fault import kernel_fault
from spectrumkv.common.kv.codecs.fixed_rate.self_check import LAYERS
from spectrumkv.common.kv.warm_up import TRIAL_TOKENS, decode_once
from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.rpc.channel import MAX_MESSAGE_BYTES
from spectrumkv.common.rpc.decode_methods import ArrivedPiece
from spectrumkv.common.rpc.decode_protocol import expect_begin, expect_end, expect_no_request, requests_until_close
from spectrumkv.common.rpc.decode_stream import ArrivedRequest, Request, serialized_bytes
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.common.service.config import DecodeConfig
from spectrumkv.common.telemetry.metrics import BASIS, FRAMING, Metrics
from spectrumkv.common.telemetry.request_log import check_request_id, current_request
from spectrumkv.decode_server.admission import admit, check_first_tokens, first_tokens
from spectrumkv.decode_server.bases import BasisStore
from spectrumkv.decode_server.engine import DecodeEngine
from spectrumkv.decode_server.kv_pool import KvPool
from spectrumkv.decode_server.receiver import MESSAGES_AHEAD, KvReceiver, throttled
from spectrumkv.decode_server.request import DecodeRequest
from spectrumkv.v1 import decode_pb2, decode_pb2_grpc, generation_pb2, kv_pb2

# Read once: it is a file of its own, which cannot be opened when a process has no file descriptors left.
_VERSION = version("spectrumkv")
# A basis has up to a few hundred megabytes.
PUT_BASIS_SECONDS = 120.0
# A message that has no prompt takes less, and a token id of a prompt no more than that.
FEWEST_MESSAGE_BYTES, TOKEN_ID_BYTES = 2 << 20, 5


class DecodeService(decode_pb2_grpc.DecodeServiceServicer):
    """Generates from KV caches that prefill sends.

    Args:
        loaded: the model.
        config: the service's options.
        metrics: the process's metrics.

    Attributes:
        vitals: say whether the model and its device work.
    """

    def __init__(self, loaded: LoadedModel, config: DecodeConfig, metrics: Metrics) -> None:
        self._loaded = loaded
        self._config = config
        self._metrics = metrics
        self._pool = KvPool(loaded.geometry, config.kv_memory, loaded.device, metrics)
        if loaded.device.type == "cuda" and self._pool.slots >= TRIAL_TOKENS:
            # Triton compiles here what the first request would wait for.
            with self._pool.reserve(TRIAL_TOKENS) as slots:
                layers = range(min(LAYERS, loaded.geometry.layers))
                views = [(slots.keys(one, 0, TRIAL_TOKENS), slots.values(one, 0, TRIAL_TOKENS)) for one in layers]
                decode_once(views, loaded.geometry)
        metrics.kernel_faults.set(bool(kernel_fault()))
        self._engine = DecodeEngine(loaded, self._pool, config.max_running, metrics)
        self.vitals = self._engine.vitals
        self._bases = BasisStore(loaded.geometry)
        metrics.requests_running.set_function(lambda: self._engine.running)
        metrics.requests_waiting.set_function(lambda: self._engine.waiting)

    @property
    def most_message_bytes(self) -> int:
        """The most bytes of a message that prefill may send: Begin has the prompt's tokens, a chunk up to 1 MiB."""
        return min(FEWEST_MESSAGE_BYTES + TOKEN_ID_BYTES * self._loaded.context_length, MAX_MESSAGE_BYTES)

    def Decode(  # noqa: N802  # gRPC's spelling
        self, requests: Iterator[ArrivedRequest], context: grpc.ServicerContext
    ) -> Iterator[decode_pb2.DecodeResponse]:
        """Yield the answers to one request: admit it, receive its KV, generate.

        Leaving this function, however that comes, frees everything that the request held.
        """
        with (
            RpcScope(context, self._config.deadline, self._config.max_deadline) as scope,
            self.vitals.leaving_after(scope.on_end),
            self._rejections_counted(),
            self._device_watched(),
            self._arriving(requests_until_close(requests, scope)) as messages,
        ):
            begin = self._read_begin(messages)
            with admit(begin, self._loaded, self._pool, self._bases) as request:
                yield decode_pb2.DecodeResponse(admitted=decode_pb2.Admitted(slots=request.slots))
                end = self._receive_kv(request, messages)
                if not all(first.finished for first in first_tokens(end)):
                    yield from self._generate(request, first_tokens(end), scope)

    def PutBasis(  # noqa: N802  # gRPC's spelling
        self, request_iterator: Iterator[ArrivedPiece], context: grpc.ServicerContext
    ) -> decode_pb2.PutBasisResponse:
        """Return once the basis in which a prefill worker codes is received and kept.

        Raises:
            CancelledError: prefill went away.
            DataLossError: the basis arrived damaged.
            DeadlineExceededError: the basis took too long.
            InvalidArgumentError: it is no basis for this model.
        """
        with (
            RpcScope(context, self._config.deadline, self._config.max_deadline) as scope,
            self.vitals.leaving_after(scope.on_end),
            self._rejections_counted(),
        ):
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
        """Return what is served and how full this worker is."""
        return decode_pb2.DecodeServiceGetServerInfoResponse(
            version=_VERSION,
            model_name=self._loaded.name,
            model=self._loaded.spec.to_proto(),
            codecs=[kv_pb2.CodecId(name=name, version=codecs.get(name).version) for name in codecs],
            device=str(self._loaded.device),
            slots_total=self._pool.slots,
            slots_used=self._pool.used,
            requests_running=self._engine.running,
        )

    def start(self) -> None:
        """Start the engine; call this before the server takes requests."""
        self._engine.start()

    def stop(self) -> None:
        """End the engine; call after the server has drained."""
        self._engine.stop()

    @contextmanager
    def _arriving(self, messages: Iterator[Request]) -> Iterator[Iterator[Request]]:
        """Yield the messages at the pace at which they should be worked on.

        On a CPU they are throttled while requests generate; on a GPU the next ones are read while one is verified and
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
        """Count messages that arrive damaged, by what is wrong with them.

        Raises:
            DataLossError: the block raised it.
        """
        try:
            yield
        except DataLossError as error:
            self._metrics.chunks_rejected.labels(error.reason).inc()
            raise

    @contextmanager
    def _device_watched(self) -> Iterator[None]:
        """Take in the loss of the device, which the thread that writes to the slots may meet before any step does.

        Raises:
            UnavailableError: the device is lost.
            RuntimeError: something else failed.
        """
        try:
            yield
        except RuntimeError as error:
            if not is_device_lost(error):
                raise
            self.vitals.fail(f"the device is lost: {error}")
            raise UnavailableError("this decode worker has lost its device; try another worker") from error

    def _read_begin(self, messages: Iterator[Request]) -> decode_pb2.Begin:
        """Return Begin, noted in the request's log line.

        Raises:
            DataLossError: the stream starts with another message, or Begin is damaged.
            InvalidArgumentError: a log cannot hold the request's id.
        """
        message = expect_begin(messages)
        begin, size = message.begin, serialized_bytes(message)
        check_request_id(begin.request_id)
        self._metrics.kv_bytes_received.labels(FRAMING).inc(size)
        current_request().note(request_id=begin.request_id, prompt_tokens=len(begin.prompt_token_ids), kv_bytes=size)
        return begin

    def _receive_kv(self, request: DecodeRequest, messages: Iterator[Request]) -> decode_pb2.End:
        """Return End, once all KV is verified and in the slots; each chunk is written as it arrives.

        Raises:
            DataLossError: a message is damaged, missing, or out of order.
            InvalidArgumentError: the model does not have a first token, or there are more or fewer than answers.
            CancelledError: prefill went away.
            DeadlineExceededError: the deadline passed.
        """
        with KvReceiver(
            self._pool, request.allocation, request.decoder, request.prompt_tokens, self._metrics
        ) as receiver:
            noted = _noted(messages)
            while isinstance(message := next(noted), KvChunk):
                with self.vitals.working():
                    receiver.accept(message, serialized_bytes(message))
            end = expect_end(message)
            self._metrics.kv_bytes_received.labels(FRAMING).inc(serialized_bytes(message))
            if not all(first.finished for first in first_tokens(end)):
                receiver.finish(end)
                check_first_tokens(first_tokens(end), len(request.answers), self._loaded.spec.vocab_size)
            expect_no_request(messages)
        return end

    def _generate(
        self, request: DecodeRequest, first: Sequence[decode_pb2.FirstToken], scope: RpcScope
    ) -> Iterator[decode_pb2.DecodeResponse]:
        """Yield each answer's tokens from the second on, then Finished."""
        answers = request.start(first)
        joined_at = time.monotonic()
        current_request().begin_stage("decode", joined_at)
        current_request().at_end(
            lambda: {
                "completion_tokens": request.completion_tokens,
                "decode_seconds": time.monotonic() - joined_at,
            }
        )
        previous_at: dict[int, float] = {}
        finish_reason = generation_pb2.FINISH_REASON_UNSPECIFIED
        with self._metrics.request_duration.labels("decode").time(), self._recomputation_counted(request):
            for token in self._engine.generate(answers, scope):
                # Not the time at which the caller takes the token: a slow reader makes no token late.
                if token.answer in previous_at:
                    self._metrics.inter_token_latency.observe(token.made_at - previous_at[token.answer])
                previous_at[token.answer] = token.made_at
                message = token_message(token.index, token.sampled, token.delta, token.answer)
                if token.answer == 0:
                    finish_reason = message.finish_reason
                yield decode_pb2.DecodeResponse(token=message)
        finished = decode_pb2.DecodeFinished(
            finish_reason=finish_reason,
            recomputed_prompt_tokens=request.recomputed_prompt_tokens,
            tokens=request.completion_tokens,
        )
        yield decode_pb2.DecodeResponse(finished=finished)

    @contextmanager
    def _recomputation_counted(self, request: DecodeRequest) -> Iterator[None]:
        """Count the prompt tokens that the model computed although their KV was there, however the request ends."""
        try:
            yield
        finally:
            self._metrics.prompt_tokens_recomputed.inc(request.recomputed_prompt_tokens)


def _noted(messages: Iterator[Request]) -> Iterator[Request]:
    """Yield messages of KV; the request's log line says how many bytes they had and how long they took."""
    record, started_at = current_request(), time.monotonic()
    record.begin_stage("receive", started_at)
    for message in messages:
        record.add(kv_bytes=serialized_bytes(message))
        record.note(receive_seconds=time.monotonic() - started_at)
        yield message
