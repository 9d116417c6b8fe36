import pytest

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.telemetry.tracing import RequestSpan, TraceContext

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ([("traceparent", PARENT)], TraceContext(PARENT)),
        ([("traceparent", PARENT), ("tracestate", "a=1"), ("tracestate", "b=2")], TraceContext(PARENT, "a=1,b=2")),
        ([("traceparent", PARENT), ("tracestate", "x" * 513)], TraceContext(PARENT)),
        ([("traceparent", "cc-" + PARENT[3:] + "-later-versions-have-more")], None),
        ([("tracestate", "a=1")], TraceContext()),
        ([("traceparent", PARENT), ("traceparent", PARENT)], TraceContext()),
        ([("traceparent", PARENT.upper())], TraceContext()),
        ([("traceparent", "ff" + PARENT[2:])], TraceContext()),
        ([("traceparent", PARENT + "-more")], TraceContext()),
        ([("traceparent", f"00-{'0' * 32}-b7ad6b7169203331-01")], TraceContext()),
        ([("traceparent", f"00-{TRACE_ID}-{'0' * 16}-01")], TraceContext()),
        ([("traceparent", PARENT[:-1])], TraceContext()),
        ([("traceparent", PARENT + "\n")], TraceContext()),
    ],
)
def test_trace_contexts_are_read_as_the_recommendation_says(metadata, expected):
    found = TraceContext.from_metadata(metadata)
    if expected is None:
        assert found.trace_id == TRACE_ID
    else:
        assert found == expected
        assert TraceContext.from_metadata(found.metadata) == found


MEMBERS = ",".join(f"k{number}=v" for number in range(32))


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (["a=1"], "a=1"),
        ([" a=1 ,\tb=2,, "], "a=1,b=2"),
        (["tenant@system=x y", "b=2"], "tenant@system=x y,b=2"),
        ([MEMBERS], MEMBERS),
        ([f"a={'1' * 256}"], f"a={'1' * 256}"),
        (["a=1," + "x" * 400], ""),
        (["a=1," + "x=y" * 200], ""),
        ([MEMBERS, "one=more"], ""),
        (["a=1,a=2"], ""),
        (["secret text"], ""),
        (["a=secret=text"], ""),
        (["a=1,Secret=text"], ""),
        (["a=1,secret\x07=text"], ""),
        (["a=1,secret=text\n"], ""),
        (["a=1,secret=größer"], ""),
        (["secret", "a=1"], ""),
        ([f"{'secret' * 50}=1"], ""),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_tracestate_goes_on_whole_or_not_at_all_and_never_to_the_log(headers, expected, caplog):
    metadata = [("traceparent", PARENT), *(("tracestate", header) for header in headers)]
    found = TraceContext.from_metadata(metadata)
    assert found == TraceContext(PARENT, expected)
    RequestSpan("PrefillService", found).end("OK", {}, [])
    assert TraceContext.from_metadata(found.metadata) == found
    assert caplog.text == ""


def test_a_traceparent_is_never_logged_either(caplog):
    for text in ("secret" * 200, PARENT + "-secret", "secret"):
        TraceContext.from_metadata([("traceparent", text), ("tracestate", "secret")])
    assert caplog.text == ""


def test_a_trace_of_ones_own_making_is_checked():
    with pytest.raises(InvalidArgumentError, match="traceparent is 'x'"):
        TraceContext("x")
