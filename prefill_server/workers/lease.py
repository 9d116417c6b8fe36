"""The lease that prefill holds on a decode worker for one request."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import grpc

from spectrumkv.common.errors import (
    CancelledError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    NotFoundError,
    PermissionDeniedError,
    SpectrumKVError,
    UnansweredError,
    UnauthenticatedError,
    UnavailableError,
)
from spectrumkv.common.rpc.decode_protocol import expect_admitted, expect_no_response, tokens_and_finished
from spectrumkv.common.rpc.interceptor import as_known_error
from spectrumkv.common.rpc.limits.stalled_readers import STALL_SECONDS, Reader, StalledReaders
from spectrumkv.common.rpc.scope import RpcScope, cancelled_after
from spectrumkv.common.rpc.status import error_from_rpc
from spectrumkv.common.service.config import Address
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.common.telemetry.tracing import current_trace
from spectrumkv.prefill_server.transfer.pipeline import KvPipeline
from spectrumkv.prefill_server.workers.token_pace import TokenPace
from spectrumkv.v1 import decode_pb2

# A worker admits a request within milliseconds. One that is connected and does not answer for so long is stuck.
ADMISSION_SECONDS = 10.0
# gRPC rounds timeouts, and two services' threads notice the same deadline at different moments.
DEADLINE_SLACK_SECONDS = 1.0
# Whoever answers pings and takes no KV would hold memory for which requests to all workers wait.
_links = StalledReaders(STALL_SECONDS)


def open_lease(
    worker: Address,
    open_stream: Callable[..., Any],
    pipeline: KvPipeline,
    scope: RpcScope,
    metrics: Metrics,
    pace: TokenPace,
) -> "DecodeLease":
    """Start a Decode stream.

    Args:
        worker: the worker's address.
        open_stream: starts a Decode RPC with the worker.
        pipeline: makes the messages to send.
        scope: the client's RPC; when it ends, so does the stream.
        metrics: counts answers that arrive damaged.
        pace: of the worker; learns how long its tokens take.

    Returns:
        The lease, whose admission the caller waits for next.
    """
    link = _links.enter(lambda error: call.cancel())
    try:
        messages = link.taking(pipeline.messages())
        call = open_stream(messages, timeout=scope.seconds_remaining, metadata=current_trace().metadata)
    except BaseException:
        _links.leave(link)
        raise
    call.add_done_callback(lambda _: _links.leave(link))
    call.add_done_callback(lambda _: pipeline.cancel())
    scope.on_end(call.cancel)
    return DecodeLease(worker, call, pipeline, scope, metrics, pace, link)


class DecodeLease:
    """Holds one Decode stream, and so slots on a decode worker.

    A context manager; leaving it ends the stream, which frees the slots.

    Args:
        worker: the worker's address.
        call: the Decode RPC.
        pipeline: makes the messages to send.
        scope: the client's RPC.
        metrics: counts answers that arrive damaged.
        pace: of the worker; learns how long its tokens take.
        link: notes for how long messages wait for the worker.

    Attributes:
        worker: the worker's address.
        pipeline: makes the messages to send.
        admitted: whether the worker has admitted the request.
        worker_error: the latest error that was the worker's, or the way's to it; None where there was none.
    """

    def __init__(
        self,
        worker: Address,
        call: Any,
        pipeline: KvPipeline,
        scope: RpcScope,
        metrics: Metrics,
        pace: TokenPace,
        link: Reader,
    ) -> None:
        self.worker = worker
        self.pipeline = pipeline
        self.worker_error: SpectrumKVError | None = None
        self._call = call
        self._scope = scope
        self._metrics = metrics
        self._pace = pace
        self._link = link
        self.admitted = False
        self._unanswered = False

    def wait_for_admission(self) -> None:
        """Wait for the answer to Begin; the stream is over where the worker does not admit the request.

        Raises:
            UnansweredError: the worker did not answer in time.
            SpectrumKVError: the worker refused the request, or could not be reached; the message names the worker.
        """
        try:
            with self._errors_named(), cancelled_after(ADMISSION_SECONDS, self._give_up):
                expect_admitted(self._call)
                self.admitted = True
        except BaseException:
            self._call.cancel()
            raise

    def responses(self) -> Iterator[decode_pb2.DecodeResponse]:
        """Read what decode answers to End.

        Yields:
            Tokens, then Finished; nothing where every answer's first token was its last.

        Raises:
            DataLossError: an answer is damaged, missing or out of order.
            InternalError: an answer has a token that the model does not have.
            SpectrumKVError: the stream failed; the message names the worker.
        """
        first = self.pipeline.first_tokens
        if first and all(one.finished for one in first):
            # The client has all of its answers already, whatever happens to the worker now.
            with suppress(UnavailableError), self._errors_named():
                expect_no_response(self._call)
            return
        with self._errors_named():
            awaited = {i for i, one in enumerate(first) if not one.finished}
            yield from self._timed(tokens_and_finished(self._call, self.pipeline.vocab_size, awaited))

    def _timed(self, responses: Iterator[decode_pb2.DecodeResponse]) -> Iterator[decode_pb2.DecodeResponse]:
        """Yield the responses, and have the worker's pace learn how long each step was waited for.

        A step gives each answer one token. The first step comes when the KV is there, which takes longer the longer
        the prompt is: it does not count.
        """
        latest, waited = 0, 0.0
        asked_at = time.monotonic()
        for response in responses:
            waited += time.monotonic() - asked_at
            if response.HasField("token") and response.token.index > latest:
                if latest:
                    self._pace.add(waited)
                latest, waited = response.token.index, 0.0
            yield response
            # A client that reads slowly makes no worker slow.
            asked_at = time.monotonic()

    def on_end(self, callback: Callable[[], object]) -> None:
        """Call `callback` once the stream is over, from a thread that it must not block."""
        self._call.add_done_callback(lambda _: callback())

    def failure(self) -> SpectrumKVError | None:
        """Return why the stream ended before the model's pass did; None where it has not ended."""
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
        self.pipeline.wait_until_idle()

    def _give_up(self) -> None:
        self._unanswered = True
        self._call.cancel()

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Turn a failure of the stream into an error that names the worker."""
        try:
            yield
        except grpc.RpcError as error:
            raise self._error(error) from error
        except DataLossError as error:
            self._metrics.chunks_rejected.labels(error.reason).inc()
            raise self._named(error) from error
        except InternalError as error:
            raise self._named(error) from error

    def _error(self, error: grpc.RpcError) -> SpectrumKVError:
        self._scope.check()
        if self.pipeline.failure is not None:
            return as_known_error(self.pipeline.failure)
        known = error_from_rpc(error)
        if self._link.error is not None:
            known = UnavailableError(f"it took no KV for {STALL_SECONDS:g} s")
        elif self._unanswered:
            known = UnansweredError(f"it has not answered Begin within {ADMISSION_SECONDS:g} s")
        elif isinstance(known, NotFoundError):
            known = InternalError(f"it answers with NOT_FOUND, which no decode worker does: {known.message}")
        elif isinstance(known, DeadlineExceededError) and not self.admitted and self._time_is_left:
            known = InternalError(f"it answered Begin with DEADLINE_EXCEEDED before the deadline: {known.message}")
        elif isinstance(known, CancelledError):
            # Prefill did not cancel, or the scope would have said so: the worker ended the stream, and says why.
            known = UnavailableError(f"it ended the stream: {known.message}")
        if isinstance(known, UnauthenticatedError | PermissionDeniedError):
            # The client has no part in the token and the certificate that prefill shows.
            known = FailedPreconditionError(f"it refuses prefill: {known.message}")
        return self._named(known)

    @property
    def _time_is_left(self) -> bool:
        """Whether a worker that says otherwise has no deadline of prefill's to blame, which ends at about its own."""
        return self._scope.seconds_remaining > DEADLINE_SLACK_SECONDS

    def _named(self, error: SpectrumKVError) -> SpectrumKVError:
        error.args = (f"decode worker {self.worker}: {error.message}",)
        self.worker_error = error
        return error
