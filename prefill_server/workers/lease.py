"""The lease that prefill holds on a decode worker for one request."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import grpc

from spectrumkv.common.errors import (
    CancelledError,
    DataLossError,
    FailedPreconditionError,
    SpectrumKVError,
    UnauthenticatedError,
    UnavailableError,
)
from spectrumkv.common.rpc.interceptor import as_known_error
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.common.rpc.status import error_from_rpc
from spectrumkv.common.service.config import Address
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.common.telemetry.tracing import current_trace
from spectrumkv.prefill_server.transfer.pipeline import KvPipeline
from spectrumkv.prefill_server.workers.answers import expect_admitted, expect_nothing, tokens_and_finished
from spectrumkv.v1 import decode_pb2

# Admitting takes a worker milliseconds. One that is connected and does not answer at all is stuck.
ADMISSION_SECONDS = 10.0


class DecodeLease:
    """One Decode stream: slots on a decode worker, for as long as this is open.

    A context manager; leaving it ends the stream, which frees the slots.

    Args:
        worker: the worker's address.
        open_stream: starts a Decode RPC with the worker.
        pipeline: makes the messages to send.
        scope: the client's RPC; when it ends, so does the stream.
        metrics: told of answers that arrive damaged.

    Raises:
        SpectrumKVError: the worker refused, or could not be reached.
    """

    def __init__(
        self,
        worker: Address,
        open_stream: Callable[..., Any],
        pipeline: KvPipeline,
        scope: RpcScope,
        metrics: Metrics,
    ) -> None:
        self.worker = worker
        self.pipeline = pipeline
        self._scope = scope
        self._metrics = metrics
        self._call = open_stream(
            pipeline.messages(), timeout=scope.seconds_remaining, metadata=current_trace().metadata
        )
        self._call.add_done_callback(lambda _: pipeline.cancel())
        scope.on_end(self._call.cancel)
        with self._closed_on_error(), self._errors_named(), self._admission_clock():
            expect_admitted(self._call)

    def responses(self) -> Iterator[decode_pb2.DecodeResponse]:
        """Yield what decode answers to End: tokens, then Finished; nothing where the first token was the last.

        Raises:
            DataLossError: an answer is damaged, missing or out of order.
            SpectrumKVError: the stream failed; the message names the worker.
        """
        first = self.pipeline.first_token
        if first is not None and first.finished:
            # The answer is whole already, whatever becomes of the worker.
            with suppress(UnavailableError), self._errors_named():
                expect_nothing(self._call)
            return
        with self._errors_named():
            yield from tokens_and_finished(self._call)

    def on_end(self, callback: Callable[[], object]) -> None:
        """Call `callback` once the stream is over, from a thread that it must not block."""
        self._call.add_done_callback(lambda _: callback())

    def failure(self) -> SpectrumKVError | None:
        """Why the stream is over before the model's pass, if it is."""
        if self._call.is_active():
            return None
        if self._call.code() is grpc.StatusCode.OK:
            return self._named(DataLossError("it ended the stream before End", "sequence"))
        return self._error(self._call)

    def __enter__(self) -> "DecodeLease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call.cancel()
        self.pipeline.cancel()
        self.pipeline.settle()

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._call.cancel()
            raise

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Turn what goes wrong with the stream into an error that names the worker."""
        try:
            yield
        except grpc.RpcError as error:
            raise self._error(error) from error
        except DataLossError as error:
            self._metrics.chunks_rejected.labels(error.reason).inc()
            raise self._named(error) from error

    @contextmanager
    def _admission_clock(self) -> Iterator[None]:
        """End the stream of a worker that does not answer."""
        clock = threading.Timer(ADMISSION_SECONDS, self._call.cancel)
        clock.daemon = True
        clock.start()
        try:
            yield
        finally:
            clock.cancel()

    def _error(self, error: grpc.RpcError) -> SpectrumKVError:
        self._scope.check()
        if self.pipeline.failure is not None:
            return as_known_error(self.pipeline.failure)
        known = error_from_rpc(error)
        if isinstance(known, CancelledError):
            # Not by us, or the scope would have said so: a worker that stops ends its streams like this, and so
            # does the clock above.
            known = UnavailableError("it did not answer or ended the stream")
        if isinstance(known, UnauthenticatedError):
            # The client has no part in the token that prefill sends.
            known = FailedPreconditionError(f"it refuses prefill: {known.message}")
        return self._named(known)

    def _named(self, error: SpectrumKVError) -> SpectrumKVError:
        error.args = (f"decode worker {self.worker}: {error.message}",)
        return error
