"""Wraps every handler: limits how many run, turns errors into statuses, counts and logs how RPCs end."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import grpc

from spectrumkv.common.errors import (
    CancelledError,
    DeadlineExceededError,
    InternalError,
    SpectrumKVError,
)
from spectrumkv.common.rpc.limits.calls import CallLimits, StreamLimit
from spectrumkv.common.rpc.limits.first_message import Behaviour, SilentCalls
from spectrumkv.common.rpc.limits.stalled_readers import StalledReaders
from spectrumkv.common.rpc.scope import RpcEnd
from spectrumkv.common.rpc.status import end_call, to_status
from spectrumkv.common.security.callers import AllowedCallers, caller_name, names_of
from spectrumkv.common.security.tokens import Refusal
from spectrumkv.common.telemetry.request_log import RequestRecord, set_current_request
from spectrumkv.common.telemetry.tracing import RequestSpan, TraceContext, set_current_trace

logger = logging.getLogger(__name__)

# Takes no work: whoever may connect may ask what is served, while every place is taken.
_FREE_METHOD = "/GetServerInfo"

CountEnded = Callable[[str], None]
# Called at the end of a stream with the status code's name, and the error where the code is not OK.
OnEnd = Callable[[str, SpectrumKVError | None], None]
StreamBehaviour = Callable[[Any, grpc.ServicerContext], Iterator[Any]]
# Takes a place for as long as a handler runs.
Hold = Callable[[grpc.ServicerContext], AbstractContextManager[None]]


class StatusInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]  # grpc has no type information
    """Limits calls, turns a handler's error into the RPC's status, counts and logs how streams end.

    Args:
        limits: how many calls there may be.
        callers: who may bring work, by a stream or an upload.
        count_ended: called with the status code's name at the end of each stream that `limits.requests` limits.
    """

    def __init__(self, limits: CallLimits, callers: AllowedCallers, count_ended: CountEnded) -> None:
        self._limits = limits
        self._callers = callers
        self._count_ended = count_ended

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Return the handler that `continuation` finds, wrapped."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        if isinstance(handler.stream_stream, Refusal):
            # It takes no place, and waits for nothing.
            refused = self._recorded(handler_call_details, handler.stream_stream, _no_place)
            return grpc.stream_stream_rpc_method_handler(refused)
        if handler_call_details.method.startswith("/spectrumkv."):
            return _waiting(handler, self._own(handler, handler_call_details), self._limits.silent)
        called = _waiting(handler, self._others(handler), self._limits.silent_watchers)
        (called.stream_stream or called.stream_unary).experimental_thread_pool = self._limits.watcher_threads
        return called

    def _own(self, handler: Any, details: Any) -> Behaviour:
        """Return a guarded behaviour of SpectrumKV's own services."""
        if handler.unary_unary and details.method.endswith(_FREE_METHOD):
            return _guard_unary(handler.unary_unary)
        if handler.unary_unary:
            return _guard_unary(self._callers.unary(_limited(handler.unary_unary, self._limits.questions)))
        if handler.stream_unary:
            return _guard_unary(self._callers.unary(_limited(handler.stream_unary, self._limits.uploads)))
        behaviour = self._callers.stream(handler.stream_stream or handler.unary_stream)
        return self._recorded(details, behaviour, self._limits.requests.hold)

    def _others(self, handler: Any) -> Behaviour:
        """Return a guarded behaviour of health and reflection."""
        behaviour: Behaviour | None = handler.unary_unary
        return behaviour or _guard_stream(
            handler.stream_stream or handler.unary_stream,
            self._limits.watchers.hold,
            self._limits.readers,
            lambda code, error: None,
        )

    def _recorded(self, details: Any, behaviour: StreamBehaviour, hold: Hold) -> StreamBehaviour:
        """Return a guarded stream of our own services; its handler finds its trace and its log record."""
        trace = TraceContext.from_metadata(details.invocation_metadata)
        service = details.method.split("/")[1].rpartition(".")[2]

        def recorded(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            record = RequestRecord(service, context.peer(), trace)
            record.note(caller=caller_name(context))
            if names := names_of(context):
                record.note(certificate=names[0])
            span = RequestSpan(service, trace)
            set_current_trace(span.trace)
            set_current_request(record)

            def on_end(code: str, error: SpectrumKVError | None) -> None:
                self._count_ended(code)
                record.write(code, error, span)

            return _guard_stream(behaviour, hold, self._limits.readers, on_end)(request, context)

        return recorded


def _waiting(handler: Any, behaviour: Behaviour, silent: SilentCalls) -> Any:
    """Return a handler whose behaviour runs once the call's first message is there."""
    answers = (
        grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    )
    if handler.request_streaming:
        return answers(silent.stream(behaviour), handler.request_deserializer, handler.response_serializer)
    return answers(silent.unary(behaviour, handler.request_deserializer), None, handler.response_serializer)


def _no_place(context: grpc.ServicerContext) -> AbstractContextManager[None]:
    return nullcontext()


def _guard_stream(behaviour: StreamBehaviour, hold: Hold, readers: StalledReaders, on_end: OnEnd) -> StreamBehaviour:
    def guarded(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        end = RpcEnd(context)
        reader = readers.enter(lambda error: end_call(context, error))
        try:
            with hold(context):
                yield from reader.taking(behaviour(request, context))
        except GeneratorExit:
            gone = reader.error or end.error
            on_end(gone.code, gone)
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
        finally:
            readers.leave(reader)

    return guarded


def _limited(behaviour: Behaviour, limit: StreamLimit) -> Behaviour:
    def limited(request: Any, context: grpc.ServicerContext) -> Any:
        with limit.hold(context):
            return behaviour(request, context)

    return limited


def _guard_unary(behaviour: Behaviour) -> Behaviour:
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
