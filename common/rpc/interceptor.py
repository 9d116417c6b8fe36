"""Wraps every handler: limits how many run, turns errors into statuses, counts and logs how RPCs end."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from spectrumkv.common.errors import (
    CancelledError,
    DeadlineExceededError,
    InternalError,
    ResourceExhaustedError,
    SpectrumKVError,
    UnavailableError,
    UnimplementedError,
)
from spectrumkv.common.rpc.scope import RpcEnd
from spectrumkv.common.rpc.status import to_status
from spectrumkv.common.telemetry.request_log import RequestRecord, set_current_request
from spectrumkv.common.telemetry.tracing import RequestSpan, TraceContext, set_current_trace

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1.0

CountEnded = Callable[[str], None]
# Called at the end of a stream with the status code's name, and the error where the code is not OK.
OnEnd = Callable[[str, SpectrumKVError | None], None]
StreamBehaviour = Callable[[Any, grpc.ServicerContext], Iterator[Any]]
UnaryBehaviour = Callable[[Any, grpc.ServicerContext], Any]


class StreamLimit:
    """Counts the streams that are open, and refuses more than a limit.

    Args:
        limit: how many may be open.
        refusal: makes the error for one more.
    """

    def __init__(self, limit: int, refusal: Callable[[], SpectrumKVError]) -> None:
        self._limit = limit
        self._refusal = refusal
        self._lock = threading.Lock()
        self._handlers = 0
        # Each stream counts twice here: for its handler, and for its RPC, which ends only when the caller has the
        # status.
        self._unfinished = 0
        self._when_none_left: Callable[[], None] | None = None
        self._closed = False

    @contextmanager
    def hold(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Count a stream as open while its handler runs.

        Args:
            context: of the stream.

        Raises:
            UnavailableError: the server is shutting down.
            SpectrumKVError: as many streams as the limit allows are open.
        """
        with self._lock:
            if self._closed:
                raise UnavailableError("this server is shutting down; try another one", RETRY_AFTER_SECONDS)
            if self._handlers >= self._limit:
                raise self._refusal()
            self._handlers += 1
            self._unfinished += 2
        if not context.add_callback(self._finish_one):
            self._finish_one()
        try:
            yield
        finally:
            with self._lock:
                self._handlers -= 1
            self._finish_one()

    def close(self) -> None:
        """Refuse every further stream."""
        with self._lock:
            self._closed = True

    def when_none_left(self, callback: Callable[[], None]) -> None:
        """Call `callback` when no stream is open: at once, or at the end of the last one."""
        with self._lock:
            if self._unfinished:
                self._when_none_left = callback
                return
        callback()

    def _finish_one(self) -> None:
        with self._lock:
            self._unfinished -= 1
            if self._unfinished or self._when_none_left is None:
                return
            callback, self._when_none_left = self._when_none_left, None
        callback()


def request_limit(limit: int) -> StreamLimit:
    """Return the limit of requests; one more is refused with RESOURCE_EXHAUSTED and told when to try again."""
    sentence = (
        f"{limit} requests are in this server, as many as --max-waiting (prefill) or --max-streams (decode) allows; "
        "try again later"
    )
    return StreamLimit(limit, lambda: ResourceExhaustedError(sentence, RETRY_AFTER_SECONDS))


def watch_limit(limit: int) -> StreamLimit:
    """Return the limit of streams of health and reflection; one more is refused with UNIMPLEMENTED.

    A gRPC client that watches health goes on without it where the status is UNIMPLEMENTED; any other status tells it
    that the server is unhealthy (github.com/grpc/proposal, A17).
    """
    return StreamLimit(limit, lambda: UnimplementedError(f"{limit} streams watch this server, as many as it serves"))


def upload_limit(limit: int) -> StreamLimit:
    """Return the limit of calls that send a stream and get one answer; one more is refused like a request."""
    sentence = f"{limit} uploads are under way to this server, as many as it serves; try again later"
    return StreamLimit(limit, lambda: ResourceExhaustedError(sentence, RETRY_AFTER_SECONDS))


class StatusInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]  # grpc has no type information
    """Limits streams, turns a handler's error into the RPC's status, counts and logs how streams end.

    Args:
        requests: limits the streams of SpectrumKV's own services.
        watchers: limits all other streams, which are those of health and reflection.
        uploads: limits calls that send a stream and get one answer.
        count_ended: called with the status code's name at the end of each stream that `requests` limits.
    """

    def __init__(
        self, requests: StreamLimit, watchers: StreamLimit, uploads: StreamLimit, count_ended: CountEnded
    ) -> None:
        self._requests = requests
        self._watchers = watchers
        self._uploads = uploads
        self._count_ended = count_ended

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Return the handler that `continuation` finds, wrapped."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        ours = handler_call_details.method.startswith("/spectrumkv.")
        serialization = handler.request_deserializer, handler.response_serializer
        if handler.unary_unary:
            guarded_unary = _guard_unary(handler.unary_unary) if ours else handler.unary_unary
            return grpc.unary_unary_rpc_method_handler(guarded_unary, *serialization)
        if handler.stream_unary:
            guarded_upload = _guard_unary(_limited(handler.stream_unary, self._uploads))
            return grpc.stream_unary_rpc_method_handler(guarded_upload, *serialization)
        behaviour = handler.stream_stream or handler.unary_stream
        if ours:
            guarded = _recorded(handler_call_details, behaviour, self._requests, self._count_ended)
        else:
            guarded = _guard_stream(behaviour, self._watchers, lambda code, error: None)
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(guarded, *serialization)
        return grpc.unary_stream_rpc_method_handler(guarded, *serialization)


def _recorded(
    details: Any, behaviour: StreamBehaviour, limit: StreamLimit, count_ended: CountEnded
) -> StreamBehaviour:
    """Return a guarded stream of our own services; its handler finds its trace and its log record."""
    trace = TraceContext.from_metadata(details.invocation_metadata)
    service = details.method.split("/")[1].rpartition(".")[2]

    def recorded(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        record = RequestRecord(service, context.peer(), trace)
        span = RequestSpan(service, trace)
        set_current_trace(span.trace)
        set_current_request(record)

        def on_end(code: str, error: SpectrumKVError | None) -> None:
            count_ended(code)
            record.write(code, error, span)

        return _guard_stream(behaviour, limit, on_end)(request, context)

    return recorded


def _guard_stream(behaviour: StreamBehaviour, limit: StreamLimit, on_end: OnEnd) -> StreamBehaviour:
    def guarded(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        end = RpcEnd(context)
        try:
            with limit.hold(context):
                yield from behaviour(request, context)
        except GeneratorExit:
            on_end(end.error.code, end.error)
            raise
        except Exception as error:  # noqa: BLE001  # the boundary where any error must become a status
            # gRPC raises a plain RpcError in a handler that waits for a caller which has gone.
            known = end.error if type(error) is grpc.RpcError else as_known_error(error)
            # Or gRPC ends the iterator of requests, and the handler takes a deadline for a cancel.
            if isinstance(known, CancelledError) and isinstance(end.error, DeadlineExceededError):
                known = end.error
            on_end(known.code, known)
            if context.is_active():
                context.abort_with_status(to_status(known))
        else:
            left = None if context.is_active() else end.error
            on_end(left.code if left else "OK", left)

    return guarded


def _limited(behaviour: UnaryBehaviour, limit: StreamLimit) -> UnaryBehaviour:
    def limited(request: Any, context: grpc.ServicerContext) -> Any:
        with limit.hold(context):
            return behaviour(request, context)

    return limited


def _guard_unary(behaviour: UnaryBehaviour) -> UnaryBehaviour:
    def guarded(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return behaviour(request, context)
        except Exception as error:  # noqa: BLE001  # the boundary where any error must become a status
            return context.abort_with_status(to_status(as_known_error(error)))

    return guarded


def as_known_error(error: Exception) -> SpectrumKVError:
    """Return the error if it is one of ours; otherwise log it and return what a caller may know of it."""
    if isinstance(error, SpectrumKVError):
        return error
    logger.error("a handler failed", exc_info=error)
    return InternalError(f"{type(error).__name__}: {error}; the server's log has more")
