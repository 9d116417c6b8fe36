"""Spans of both services on one request, as an exporter gets them."""

import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from spectrumkv.client.request import Sampling, TokenIds
from spectrumkv.common.errors import FailedPreconditionError, InvalidArgumentError, SpectrumKVError
from spectrumkv.common.telemetry import tracing
from spectrumkv.common.telemetry.tracing import RequestSpan, TraceContext, set_up_spans
from tests.services.pair import Pair

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CALLER = TraceContext(f"00-{TRACE}-{PARENT}-01", "vendor=1")


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing.otel, "get_tracer", provider.get_tracer)
    yield exporter
    provider.shutdown()


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """Spans by service, stages by service and stage."""
    found = {one.context.span_id: one for one in exporter.get_finished_spans()}
    return {
        f"{found[one.parent.span_id].name}/{one.name}"
        if one.parent and one.parent.span_id in found
        else one.name: one
        for one in found.values()
    }


def test_a_request_is_one_trace_across_both_services(llama_pair: Pair, exported: InMemorySpanExporter) -> None:
    with llama_pair.client() as client:
        sampling = Sampling(max_tokens=6, ignore_eos=True)
        client.generate(TokenIds((1, 2, 3)), sampling=sampling, request_id="r1", trace=CALLER).result()
    found = by_name(exported)
    assert set(found) == {
        "PrefillService",
        "PrefillService/reserve",
        "PrefillService/queue",
        "PrefillService/prefill",
        "PrefillService/hand-off",
        "PrefillService/decode",
        "PrefillService/DecodeService",
        "DecodeService/receive",
        "DecodeService/decode",
    }
    assert {format(one.context.trace_id, "032x") for one in found.values()} == {TRACE}
    prefill, decode = found["PrefillService"], found["PrefillService/DecodeService"]
    assert prefill.parent is not None
    assert format(prefill.parent.span_id, "016x") == PARENT
    assert prefill.context.trace_state["vendor"] == "1"
    for one in (prefill, decode):
        assert one.attributes is not None
        assert one.attributes["spectrumkv.request_id"] == "r1"
        assert one.attributes["spectrumkv.code"] == "OK"
    stages = [found[f"PrefillService/{name}"] for name in ("reserve", "queue", "prefill", "hand-off", "decode")]
    times = [prefill.start_time, *(stage.end_time for stage in stages)]
    assert all(earlier <= later for earlier, later in itertools.pairwise(times))
    assert [stage.end_time for stage in stages[:-1]] == [stage.start_time for stage in stages[1:]]
    assert stages[-1].end_time == prefill.end_time


def test_a_request_that_fails_is_an_error_with_its_code(llama_pair: Pair, exported: InMemorySpanExporter) -> None:
    with llama_pair.client() as client, pytest.raises(SpectrumKVError):
        client.generate(TokenIds((10**6,)), trace=CALLER).result()
    (span,) = exported.get_finished_spans()
    assert span.status.status_code is tracing.otel.StatusCode.ERROR
    assert span.status.description == "INVALID_ARGUMENT"
    assert "1000000" not in span.to_json()


@pytest.mark.parametrize("caller", [CALLER, TraceContext()])
def test_without_a_provider_the_context_goes_on_as_it_came(caller: TraceContext) -> None:
    span = RequestSpan("PrefillService", caller)
    assert span.trace == caller
    span.end("OK", {"request_id": "r"}, [("queue", 0.0)])


def test_nothing_is_set_up_unless_an_exporter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing.otel, "set_tracer_provider", lambda provider: pytest.fail("it was set up"))
    monkeypatch.delenv("OTEL_TRACES_EXPORTER", raising=False)
    set_up_spans("prefill")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    set_up_spans("prefill")


def test_what_cannot_be_exported_to_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "carrier-pigeon")
    with pytest.raises(InvalidArgumentError, match="asks for 'carrier-pigeon'; installed: console, otlp"):
        set_up_spans("prefill")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(FailedPreconditionError, match=r"spectrumkv\[otel\]"):
        set_up_spans("prefill")


def test_a_process_exports_as_the_standard_variables_say() -> None:
    program = (
        "from spectrumkv.common.telemetry.tracing import RequestSpan, TraceContext, set_up_spans\n"
        "set_up_spans('decode')\n"
        f"RequestSpan('DecodeService', TraceContext('{CALLER.traceparent}')).end('OK', {{}}, [])\n"
    )
    environment = os.environ | {"OTEL_TRACES_EXPORTER": "console", "OTEL_RESOURCE_ATTRIBUTES": "zone=a"}
    outcome = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment, timeout=60
    )
    span = json.loads(outcome.stdout)
    assert span["context"]["trace_id"] == f"0x{TRACE}"
    assert span["resource"]["attributes"]["service.name"] == "spectrumkv-decode"
    assert span["resource"]["attributes"]["zone"] == "a"


@pytest.mark.parametrize("collector", ["away", "silent"])
def test_a_collector_that_does_not_answer_holds_up_no_end(collector: str) -> None:
    code = (
        "from spectrumkv.common.service.process import leave\n"
        "from spectrumkv.common.telemetry.tracing import RequestSpan, TraceContext, set_up_spans\n"
        "set_up_spans('decode')\n"
        "RequestSpan('DecodeService', TraceContext()).end('OK', {}, [])\n"
        "print('ends', flush=True)\n"
        "leave(0)"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        if collector == "away":
            silent.close()
        environment = os.environ | {
            "OTEL_TRACES_EXPORTER": "otlp",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        }
        command = [sys.executable, "-c", code]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ends\n"
            assert process.wait(tracing.LAST_SPANS_SECONDS + 2.0) == 0
