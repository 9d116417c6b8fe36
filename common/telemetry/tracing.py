"""Reads the W3C trace context of a call, passes it on with the next one, and records a request's OpenTelemetry spans.

OpenTelemetry's API, which is always installed, reads and writes the context. Spans are exported where the optional
extra `otel` brings the SDK; without it, or without a provider, the API's spans do nothing and the caller's context
goes on.

Spans are made by hand: the instrumentation packages for gRPC know nothing of stages, and their asyncio part is a
prerelease.
"""

import atexit
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import entry_points
from itertools import pairwise
from typing import TYPE_CHECKING

from opentelemetry import trace as otel
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from spectrumkv.common.errors import FailedPreconditionError, InvalidArgumentError, quoted

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
# How long the end of the process waits for the last spans: their collector may be away, and the SDK tries for 30 s.
LAST_SPANS_SECONDS = 2.0
EXPORTER_VARIABLE = "OTEL_TRACES_EXPORTER"
_PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_ENTRY_POINTS = "opentelemetry_traces_exporter"

_PROPAGATOR = TraceContextTextMapPropagator()
# They warn of each context that they leave out, and quote what the caller sent.
for _name in ("opentelemetry.trace.span", "opentelemetry.trace.propagation.tracecontext"):
    logging.getLogger(_name).setLevel(logging.ERROR)

Value = str | int | float
# A stage's name, and when it began by the monotonic clock. It lasts until the next one, or the request's end.
Stage = tuple[str, float]


@dataclass(frozen=True)
class TraceContext:
    """Names the trace that a request belongs to (www.w3.org/TR/trace-context).

    Attributes:
        traceparent: version, trace id, parent id and flags; "" where the request is part of no trace.
        tracestate: what tracing systems add, or "".

    Raises:
        InvalidArgumentError: `traceparent` is not what the recommendation allows.
    """

    traceparent: str = ""
    tracestate: str = ""

    def __post_init__(self) -> None:
        if self.traceparent and not _is_traceparent(self.traceparent):
            raise InvalidArgumentError(
                f"traceparent is {quoted(self.traceparent)}; allowed: 00-TRACEID-PARENTID-FLAGS, of 32, 16 and 2 "
                "hexadecimal digits in lower case"
            )

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits, or ""."""
        return self.traceparent.split("-")[1] if self.traceparent else ""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata that a call takes along."""
        pairs = ((TRACEPARENT, self.traceparent), (TRACESTATE, self.tracestate))
        return tuple((key, value) for key, value in pairs if value)

    @classmethod
    def from_metadata(cls, metadata: Iterable[tuple[str, str | bytes]]) -> "TraceContext":
        """Return the trace context in a call's metadata; what the recommendation does not allow counts as absent."""
        found: dict[str, list[str]] = {TRACEPARENT: [], TRACESTATE: []}
        for key, value in metadata:
            if key in found and isinstance(value, str):
                found[key].append(value)
        if len(found[TRACEPARENT]) != 1 or not _is_traceparent(found[TRACEPARENT][0]):
            return cls()
        return cls.from_opentelemetry(_PROPAGATOR.extract(found))

    @classmethod
    def from_opentelemetry(cls, context: Context) -> "TraceContext":
        """Return the trace context of the span that is current in `context`; an invalid span has no trace."""
        written: dict[str, str] = {}
        _PROPAGATOR.inject(written, context)
        return cls(written.get(TRACEPARENT, ""), written.get(TRACESTATE, ""))

    def to_opentelemetry(self) -> Context:
        """Return a context in which the caller's span is current."""
        return _PROPAGATOR.extract(dict(self.metadata))


def _is_traceparent(text: str) -> bool:
    # OpenTelemetry overlooks a line feed at the end and control characters in later versions' extensions, which no
    # metadata of gRPC may hold.
    if not (text.isascii() and text.isprintable()):
        return False
    return otel.get_current_span(_PROPAGATOR.extract({TRACEPARENT: text})).get_span_context().is_valid


# gRPC runs each handler in a context of its own.
_current: ContextVar[TraceContext] = ContextVar("trace_context", default=TraceContext())  # noqa: B039  # frozen


def current_trace() -> TraceContext:
    """Return the trace of the request that the calling handler serves."""
    return _current.get()


def set_current_trace(trace: TraceContext) -> None:
    """Set what `current_trace` returns to the handler that is about to run."""
    _current.set(trace)


class RequestSpan:
    """Records the span of one request on one service.

    Args:
        name: the service's name.
        caller: the trace context that the request came with.

    Attributes:
        trace: the trace context for calls that this request makes.
    """

    def __init__(self, name: str, caller: TraceContext) -> None:
        # Stages have times of the monotonic clock, and spans have wall-clock times: this is the difference.
        self._epoch_ns = time.time_ns() - time.monotonic_ns()
        self._span = _start_span(name, caller.to_opentelemetry(), kind=otel.SpanKind.SERVER)
        self.trace = TraceContext.from_opentelemetry(otel.set_span_in_context(self._span))

    def end(self, code: str, attributes: Mapping[str, Value], stages: Sequence[Stage]) -> None:
        """End the span.

        Args:
            code: the name of the status code that the request ended with.
            attributes: the fields of the request's log line.
            stages: the request's stages in order, each of which becomes a span of its own.
        """
        now = time.monotonic()
        context = otel.set_span_in_context(self._span)
        for (name, began), (_, ended) in pairwise([*stages, ("", now)]):
            _start_span(name, context, start_time=self._nanoseconds(began)).end(self._nanoseconds(ended))
        self._span.set_attributes({f"spectrumkv.{name}": value for name, value in attributes.items()})
        self._span.set_attribute("rpc.system", "grpc")
        if code not in ("OK", "CANCELLED"):
            self._span.set_status(otel.StatusCode.ERROR, code)
        self._span.end(self._nanoseconds(now))

    def _nanoseconds(self, monotonic_seconds: float) -> int:
        return self._epoch_ns + round(monotonic_seconds * 1e9)


def _start_span(
    name: str, parent: Context, kind: otel.SpanKind = otel.SpanKind.INTERNAL, start_time: int | None = None
) -> otel.Span:
    return otel.get_tracer("spectrumkv").start_span(name, parent, kind=kind, start_time=start_time)


def set_up_spans(service: str) -> None:
    """Export spans as OpenTelemetry's standard environment variables say; none if `OTEL_TRACES_EXPORTER` is not set.

    Args:
        service: "prefill" or "decode"; `OTEL_SERVICE_NAME` takes precedence.

    Raises:
        FailedPreconditionError: the variable names an exporter, and the extra `otel` is not installed.
        InvalidArgumentError: the variable names an exporter that is not installed.
    """
    named = os.environ.get(EXPORTER_VARIABLE, "").strip()
    if named in ("", "none") or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise FailedPreconditionError(
            f"{EXPORTER_VARIABLE} is {named!r} and OpenTelemetry's SDK is not installed; "
            "run pip install 'spectrumkv[otel]'"
        ) from None
    name = os.environ.get("OTEL_SERVICE_NAME", f"spectrumkv-{service}")
    provider = TracerProvider(resource=Resource.create({"service.name": name}), shutdown_on_exit=False)
    for exporter in named.split(","):
        provider.add_span_processor(BatchSpanProcessor(_exporter(exporter.strip())))
    otel.set_tracer_provider(provider)
    # The SDK's own exit waits until its exporter has given up.
    sending = threading.Thread(target=provider.shutdown, name="last-spans", daemon=True)
    atexit.register(_send_last_spans, sending)


def _send_last_spans(sending: threading.Thread) -> None:
    sending.start()
    sending.join(LAST_SPANS_SECONDS)


def _exporter(name: str) -> "SpanExporter":
    if name == "otlp":
        protocol = next(filter(None, map(os.environ.get, _PROTOCOL_VARIABLES)), "grpc")
        name = f"otlp_proto_{protocol.partition('/')[0]}"
    found = {one.name: one for one in entry_points(group=_ENTRY_POINTS)}
    if name not in found:
        raise InvalidArgumentError(f"{EXPORTER_VARIABLE} asks for {name!r}; installed: {', '.join(sorted(found))}")
    exporter: SpanExporter = found[name].load()()
    return exporter
