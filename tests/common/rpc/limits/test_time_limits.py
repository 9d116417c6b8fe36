"""Times that a server sets, whatever its callers say or do."""

import threading

import grpc
import pytest

from spectrumkv.common.rpc import server as rpc
from spectrumkv.common.rpc.scope import RpcScope
from tests.common.rpc.scripted import WAIT_SECONDS, response, served, wait
from tests.faults.connections.silent_streams import silent_connections

# More than flow control lets a client have that reads nothing.
BIG = response("x" * (7 << 20))
# A message without fields.
EMPTY = b"\0\0\0\0\0"


def refusal(call):
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value


@pytest.mark.parametrize("given", [WAIT_SECONDS, 9e6])
def test_a_callers_deadline_has_a_ceiling(given):
    ended = threading.Event()

    def handler(request, context):
        with RpcScope(context, 60.0, longest_seconds=0.2) as scope:
            scope.on_end(ended.set)
            assert scope.seconds_remaining <= 0.2
            yield response()
            wait(ended)
            scope.check()

    with served(handler) as server:
        error = refusal(server.generate(timeout=given))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "0.2 s, the longest that this server allows (--max-deadline)" in error.details()
        assert server.code() == "DEADLINE_EXCEEDED"


def test_the_ceiling_holds_for_a_handler_that_waits_for_its_caller():
    went_on = threading.Event()

    def handler(request, context):
        with RpcScope(context, 60.0, longest_seconds=0.2):
            yield response()
            yield BIG
            yield BIG
            yield BIG
            went_on.set()

    with served(handler) as server:
        call = server.generate(timeout=9e6)
        next(call)
        assert server.code() == "DEADLINE_EXCEEDED"
        assert not went_on.is_set()
        error = refusal(call)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "0.2 s, the longest that this server allows (--max-deadline)" in error.details()


def test_a_caller_that_reads_nothing_loses_its_place(monkeypatch):
    monkeypatch.setattr(rpc, "STALL_SECONDS", 0.3)
    left = threading.Event()

    def handler(request, context):
        with RpcScope(context, 60.0):
            try:
                # Only the caller that reads nothing gets what takes long to read.
                yield from () if left.is_set() else (response(), BIG, BIG, BIG)
                yield response("short")
            finally:
                left.set()

    with served(handler, threads=1) as server:
        call = server.generate(timeout=None)
        next(call)
        assert server.code() == "CANCELLED"
        wait(left)
        error = refusal(call)
        assert error.code() is grpc.StatusCode.CANCELLED
        assert error.details() == "the caller took no message for 0.3 s"
        assert [one.token.text for one in server.generate()] == ["short"]
        assert server.code() == "OK"


def test_a_caller_that_lets_no_byte_through_loses_its_place(monkeypatch):
    monkeypatch.setattr(rpc, "STALL_SECONDS", 0.3)

    answers = iter([BIG, response("short")])

    def handler(request, context):
        yield next(answers)

    with (
        served(handler, threads=1) as server,
        silent_connections(server.address, 1, window=0) as [connection],
    ):
        connection.open("/spectrumkv.v1.PrefillService/Generate", EMPTY, ends=True)
        assert server.code() == "CANCELLED"
        assert [one.token.text for one in server.generate()] == ["short"]


def test_a_handler_that_has_nothing_to_say_for_long_is_no_stalled_reader(monkeypatch):
    monkeypatch.setattr(rpc, "STALL_SECONDS", 0.1)
    go = threading.Event()

    def handler(request, context):
        yield response("first")
        go.wait(1.0)
        yield response("last")

    with served(handler) as server:
        assert [one.token.text for one in server.generate()] == ["first", "last"]
