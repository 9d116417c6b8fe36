import json
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.client.request import KvChoice
from spectrumkv.common.errors import DataLossError, InvalidArgumentError, UnavailableError
from spectrumkv.common.telemetry.request_log import FORMATTERS, RequestRecord, check_request_id, current_request
from spectrumkv.common.telemetry.tracing import TraceContext, current_trace
from spectrumkv.v1 import prefill_pb2
from tests.common.rpc.scripted import WAIT_SECONDS, response, served

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


def line(code="OK", error=None, formatter="json", **fields):
    """The line that a record writes."""
    written = []
    handler = logging.Handler()
    handler.emit = written.append
    logger = logging.getLogger("spectrumkv.common.telemetry.request_log")
    logger.addHandler(handler)
    level = logger.level
    # Not by assignment: loggers remember what they were asked before.
    logger.setLevel(logging.INFO)
    try:
        record = RequestRecord("PrefillService", "ipv4:127.0.0.1:1", TraceContext(PARENT))
        record.note(**fields)
        record.write(code, error)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    (one,) = written
    return FORMATTERS[formatter]().format(one)


def test_json_has_everything_under_its_own_name():
    said = json.loads(line(request_id="r", kv_bytes=3, ttft_seconds=0.12345678))
    assert said.pop("seconds") >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", said.pop("time"))
    assert said == {
        "level": "info", "logger": "spectrumkv.common.telemetry.request_log", "message": "request ended",
        "service": "PrefillService", "peer": "ipv4:127.0.0.1:1", "request_id": "r", "trace_id": TRACE_ID,
        "code": "OK", "kv_bytes": 3, "ttft_seconds": 0.123457,
    }  # fmt: skip


def test_text_is_key_value_with_quotes_where_needed():
    said = line(formatter="text", request_id='a "b" c', kv_bytes=3)
    assert said.startswith(tuple("0123456789"))
    assert " INFO spectrumkv.common.telemetry.request_log: request ended service=PrefillService " in said
    assert r' request_id="a \"b\" c" ' in said
    assert " kv_bytes=3 code=OK seconds=" in said


@given(st.text(max_size=30), st.sampled_from(sorted(FORMATTERS)))
def test_no_value_ends_a_line_or_starts_another_field(value, formatter):
    said = line(formatter=formatter, request_id=value)
    assert len(said.splitlines()) == 1
    assert said.isascii()
    if formatter == "json":
        assert json.loads(said)["request_id"] == value
    else:
        quoted = re.findall(r' request_id=("(?:[^"\\]|\\.)*"|\S*)', said)[0]
        assert (json.loads(quoted) if quoted.startswith('"') else quoted) == value


def test_an_error_tells_why_unless_it_may_quote_the_caller():
    assert json.loads(line("UNAVAILABLE", UnavailableError("nobody is there")))["error"] == "nobody is there"
    assert "error" not in json.loads(line("INVALID_ARGUMENT", InvalidArgumentError("stop[0] is 'private'")))
    said = json.loads(line("DATA_LOSS", DataLossError("a flipped bit", "crc")))
    assert said["level"] == "warning"


def test_exceptions_are_part_of_their_json_line():
    try:
        raise ZeroDivisionError("no")
    except ZeroDivisionError as error:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "it %s", ("failed",), (type(error), error, None))
    said = json.loads(FORMATTERS["json"]().format(record))
    assert said["message"] == "it failed"
    assert "ZeroDivisionError: no" in said["exception"]


@pytest.mark.parametrize("good", ["", "a", "x" * 128, "ünïcode ids", "3f/2:a_b.c-d"])
def test_ids_that_can_be_logged(good):
    check_request_id(good)


@given(st.text(max_size=140))
def test_an_id_that_is_let_through_is_short_and_on_one_line(text):
    try:
        check_request_id(text)
    except InvalidArgumentError:
        return
    assert len(text) <= 128
    assert len(f"<{text}>".splitlines()) == 1


def test_each_handler_finds_its_own_record_and_trace(caplog):
    caplog.set_level(logging.INFO)

    def handler(request, context):
        current_request().note(request_id=request.request_id)
        yield response(current_trace().trace_id)

    with served(handler) as server:
        for request_id, metadata in (("one", [("traceparent", PARENT)]), ("two", [])):
            message = prefill_pb2.GenerateRequest(request_id=request_id, kv=KvChoice().to_proto())
            call = server.prefill.Generate(message, metadata=metadata, timeout=WAIT_SECONDS)
            assert [one.token.text for one in call] == [TRACE_ID if metadata else ""]
    ended = [one.fields for one in caplog.records if one.message == "request ended"]
    assert [(one["request_id"], one["code"], one.get("trace_id")) for one in ended] == [
        ("one", "OK", TRACE_ID),
        ("two", "OK", None),
    ]
