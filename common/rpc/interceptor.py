"""What happens around every handler: places are bounded, errors become statuses, ends are counted."""

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
# Told of the end of a stream: the status code's name, and the error where it is not OK.
OnEnd = Callable[[str, SpectrumKVError | None], None]
StreamBehaviour = Callable[[Any, grpc.ServicerContext], Iterator[Any]]
UnaryBehaviour = Callable[[Any, grpc.ServicerContext], Any]


class OpenStreams:
    """The streaming RPCs that are served now, at most `limit` of them.

    Args:
        limit: how many.
        full: makes the error for one more.
    """

    def __init__(self, limit: int, full: Callable[[], SpectrumKVError]) -> None:
        self._limit = limit
        self._full = full
        self._lock = threading.Lock()
        self._handlers = 0
        # Each stream counts twice here: its handler, and the RPC, which is over only when the caller has the
        # status.
        self._unfinished = 0
        self._when_none: Callable[[], None] | None = None
        self._closed = False

    @contextmanager
    def hold(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Hold a place while a handler runs.

        Raises:
            UnavailableError: the server is shutting down.
            SpectrumKVError: all are taken.
        """
        with self._lock:
            if self._closed:
                raise UnavailableError("this server is shutting down; try another one", RETRY_AFTER_SECONDS)
            if self._handlers >= self._limit:
                raise self._full()
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
        """Let nobody in any more."""
        with self._lock:
            self._closed = True

    def when_none(self, callback: Callable[[], None]) -> None:
        """Call `callback` once no stream is left: at once, or when the last one is over."""
        with self._lock:
            if self._unfinished:
                self._when_none = callback
                return
        callback()

    def _finish_one(self) -> None:
        with self._lock:
            self._unfinished -= 1
            if self._unfinished or self._when_none is None:
                return
            callback, self._when_none = self._when_none, None
        callback()


def requests_served(limit: int) -> OpenStreams:
    """Return places for requests; who finds none is told when to come back."""
    sentence = (
        f"{limit} requests are in this server, as many as --max-waiting (prefill) or --max-streams (decode) allows; "
        "try again later"
    )
    return OpenStreams(limit, lambda: ResourceExhaustedError(sentence, RETRY_AFTER_SECONDS))


def watchers_served(limit: int) -> OpenStreams:
    """Return places for streams of health and reflection.

    A gRPC client that is to heed health and finds no place goes on without it where the status is UNIMPLEMENTED; with
    any other it would take the server for ill (github.com/grpc/proposal, A17).
    """
    return OpenStreams(limit, lambda: UnimplementedError(f"{limit} streams watch this server, as many as it serves"))


def uploads_served(limit: int) -> OpenStreams:
    """Return places for calls that send a stream and get one answer."""
    sentence = f"{limit} uploads are under way to this server, as many as it serves; try again later"
    return OpenStreams(limit, lambda: ResourceExhaustedError(sentence, RETRY_AFTER_SECONDS))


class StatusInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]  # grpc has no type information
    """Bounds streams, ends an RPC whose handler raised with the status that the error stands for, counts and logs.

    Args:
        requests: the streams of SpectrumKV's own services.
        watchers: all other streams, which are those of health and reflection.
        uploads: calls that send a stream and get one answer.
        count_ended: called with the status code's name at the end of each stream in `requests`.
    """

    def __init__(
        self, requests: OpenStreams, watchers: OpenStreams, uploads: OpenStreams, count_ended: CountEnded
    ) -> None:
        self._requests = requests
        self._watchers = watchers
        self._uploads = uploads
        self._count_ended = count_ended

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Wrap the handler that `continuation` finds."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        ours = handler_call_details.method.startswith("/spectrumkv.")
        serialization = handler.request_deserializer, handler.response_serializer
        if handler.unary_unary:
            guarded_unary = _guard_unary(handler.unary_unary) if ours else handler.unary_unary
            return grpc.unary_unary_rpc_method_handler(guarded_unary, *serialization)
        if handler.stream_unary:
            guarded_upload = _guard_unary(_bounded(handler.stream_unary, self._uploads))
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
    details: Any, behaviour: StreamBehaviour, places: OpenStreams, count_ended: CountEnded
) -> StreamBehaviour:
    """Guard a stream of ours; its handler finds its trace and its record, which is written at the end."""
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

        return _guard_stream(behaviour, places, on_end)(request, context)

    return recorded


def _guard_stream(behaviour: StreamBehaviour, places: OpenStreams, on_end: OnEnd) -> StreamBehaviour:
    def guarded(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        end = RpcEnd(context)
        try:
            with places.hold(context):
                yield from behaviour(request, context)
        except GeneratorExit:
            on_end(end.error.code, end.error)
            raise
        except Exception as error:  # noqa: BLE001  # the boundary where any error must become a status
            # A plain RpcError is what gRPC raises to a handler that waits for a caller who has gone.
            known = end.error if type(error) is grpc.RpcError else as_known_error(error)
            # Or it tells the handler that the requests ended, who then takes a deadline for a cancel.
            if isinstance(known, CancelledError) and isinstance(end.error, DeadlineExceededError):
                known = end.error
            on_end(known.code, known)
            if context.is_active():
                context.abort_with_status(to_status(known))
        else:
            left = None if context.is_active() else end.error
            on_end(left.code if left else "OK", left)

    return guarded


def _bounded(behaviour: UnaryBehaviour, places: OpenStreams) -> UnaryBehaviour:
    def bounded(request: Any, context: grpc.ServicerContext) -> Any:
        with places.hold(context):
            return behaviour(request, context)

    return bounded


def _guard_unary(behaviour: UnaryBehaviour) -> UnaryBehaviour:
    def guarded(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return behaviour(request, context)
        except Exception as error:  # noqa: BLE001  # the boundary where any error must become a status
            return context.abort_with_status(to_status(as_known_error(error)))

    return guarded


def as_known_error(error: Exception) -> SpectrumKVError:
    """Return the error if it is one of ours; else log it and return what the caller may know of it."""
    if isinstance(error, SpectrumKVError):
        return error
    logger.error("a handler failed", exc_info=error)
    return InternalError(f"{type(error).__name__}: {error}; the server's log has more")
