import pytest

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.telemetry.tracing import TraceContext

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


def test_a_trace_of_ones_own_making_is_checked():
    with pytest.raises(InvalidArgumentError, match="traceparent is 'x'"):
        TraceContext("x")
