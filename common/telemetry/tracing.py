"""OpenTelemetry spans, where the optional extra `otel` is installed: one for each request, with its stages.

Spans are made by hand. The instrumentation packages for gRPC know nothing of stages, and their asyncio part is a
prerelease. Without the extra, or without a provider, all of this does nothing, and the trace context goes on as it
came.
"""

import os
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from itertools import pairwise

from spectrumkv.common.errors import FailedPreconditionError, InvalidArgumentError
from spectrumkv.common.telemetry.trace_context import TRACEPARENT, TRACESTATE, TraceContext

try:
    from opentelemetry import trace as otel
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    _INSTALLED = False
else:
    _INSTALLED = True

EXPORTER_VARIABLE = "OTEL_TRACES_EXPORTER"
_PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_ENTRY_POINTS = "opentelemetry_traces_exporter"

Value = str | int | float
# A stage's name, and when it began by the monotonic clock. It lasts until the next one, or the request's end.
Stage = tuple[str, float]


class RequestSpan:
    """The span of one request on one service.

    Args:
        name: of the service.
        caller: the trace that the request came with.

    Attributes:
        trace: the context for calls that this request makes.
    """

    def __init__(self, name: str, caller: TraceContext) -> None:
        self.trace = caller
        self._span: otel.Span | None = None
        if not _INSTALLED:
            return
        # Wall-clock time of monotonic times: stages are told in the latter.
        self._epoch_ns = time.time_ns() - time.monotonic_ns()
        propagator = TraceContextTextMapPropagator()
        parent = propagator.extract(dict(caller.metadata))
        self._span = otel.get_tracer("spectrumkv").start_span(name, parent, kind=otel.SpanKind.SERVER)
        own: dict[str, str] = {}
        propagator.inject(own, otel.set_span_in_context(self._span))
        if TRACEPARENT in own:
            self.trace = TraceContext(own[TRACEPARENT], own.get(TRACESTATE, ""))

    def end(self, code: str, attributes: Mapping[str, Value], stages: Sequence[Stage]) -> None:
        """End the span.

        Args:
            code: name of the status code that the request ended with.
            attributes: what the request's log line says.
            stages: in order; each becomes a span of its own.
        """
        if self._span is None:
            return
        now = time.monotonic()
        context = otel.set_span_in_context(self._span)
        for (name, began), (_, ended) in pairwise([*stages, ("", now)]):
            stage = otel.get_tracer("spectrumkv").start_span(name, context, start_time=self._nanoseconds(began))
            stage.end(self._nanoseconds(ended))
        self._span.set_attributes({f"spectrumkv.{name}": value for name, value in attributes.items()})
        self._span.set_attribute("rpc.system", "grpc")
        if code not in ("OK", "CANCELLED"):
            self._span.set_status(otel.StatusCode.ERROR, code)
        self._span.end(self._nanoseconds(now))

    def _nanoseconds(self, monotonic_seconds: float) -> int:
        return self._epoch_ns + round(monotonic_seconds * 1e9)


def set_up_spans(service: str) -> None:
    """Export spans as the standard variables of OpenTelemetry say; nothing where `OTEL_TRACES_EXPORTER` is not set.

    Args:
        service: "prefill" or "decode"; `OTEL_SERVICE_NAME` overrules it.

    Raises:
        FailedPreconditionError: the variable names an exporter, and the extra is not installed.
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
            f"{EXPORTER_VARIABLE} is {named!r} and OpenTelemetry is not installed; run pip install 'spectrumkv[otel]'"
        ) from None
    name = os.environ.get("OTEL_SERVICE_NAME", f"spectrumkv-{service}")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    for exporter in named.split(","):
        provider.add_span_processor(BatchSpanProcessor(_exporter(exporter.strip())))
    otel.set_tracer_provider(provider)


def _exporter(name: str) -> "SpanExporter":  # type: ignore[name-defined]  # noqa: F821  # of the optional extra
    if name == "otlp":
        protocol = next(filter(None, map(os.environ.get, _PROTOCOL_VARIABLES)), "grpc")
        name = f"otlp_proto_{protocol.partition('/')[0]}"
    found = {one.name: one for one in entry_points(group=_ENTRY_POINTS)}
    if name not in found:
        raise InvalidArgumentError(f"{EXPORTER_VARIABLE} asks for {name!r}; installed: {', '.join(sorted(found))}")
    return found[name].load()()
