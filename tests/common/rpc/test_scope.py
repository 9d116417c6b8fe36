import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from spectrumkv.common.errors import CancelledError, DeadlineExceededError, SpectrumKVError
from spectrumkv.common.rpc import scope as rpc_scope
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.common.rpc.status import error_from_rpc
from spectrumkv.v1 import decode_pb2
from tests.common.rpc.scripted import WAIT_SECONDS, response, served, wait

# More than flow control lets a client have that reads nothing.
BIG = response("x" * (7 << 20))


class Blocked:
    """Handlers that block in one way each, and tell when they do and when they have left."""

    def __init__(self, default_seconds=60.0):
        self.default_seconds = default_seconds
        self.blocked = threading.Event()
        self.left = threading.Event()
        self.went_on = False
        self.seconds_left = queue.SimpleQueue()

    def in_queue(self, request, context):
        waiting = queue.SimpleQueue()
        with RpcScope(context, self.default_seconds) as scope:
            try:
                scope.on_end(lambda: waiting.put("over"))
                yield response()
                self.blocked.set()
                waiting.get(timeout=WAIT_SECONDS)
                scope.check()
                self.went_on = True
            finally:
                self.left.set()

    def at_yield(self, request, context):
        with RpcScope(context, self.default_seconds):
            try:
                yield response()
                self.blocked.set()
                # The caller reads the first message and no more; the window takes one of these at most.
                yield BIG
                yield BIG
                yield BIG
                self.went_on = True
            finally:
                self.left.set()

    def in_next(self, requests, context):
        with RpcScope(context, self.default_seconds) as scope:
            try:
                next(requests)
                yield decode_pb2.DecodeResponse()
                self.blocked.set()
                # gRPC may tell a handler that the requests are over before it tells that they broke off.
                self.went_on = next(requests, None) is not None
                scope.check()
                raise CancelledError("the requests ended too early")
            finally:
                self.left.set()


def start(server, kind, timeout=WAIT_SECONDS):
    """Begin an RPC, read its first message, and return it with what keeps its requests open."""
    if kind != "in_next":
        call, sent = server.generate(timeout), None
    else:
        sent = queue.SimpleQueue()
        sent.put(decode_pb2.DecodeRequest())
        call = server.decode.Decode(iter(sent.get, None), timeout=timeout)
    next(call)
    return call, sent


def finish(call, sent):
    call.cancel()
    if sent is not None:
        sent.put(None)


KINDS = ["in_queue", "at_yield", "in_next"]


def serving(kind, handlers):
    return served(getattr(handlers, kind), stream="Decode" if kind == "in_next" else "Generate")


@pytest.mark.parametrize("kind", KINDS)
def test_finally_runs_when_the_caller_cancels(kind):
    handlers = Blocked()
    with serving(kind, handlers) as server:
        call, sent = start(server, kind)
        wait(handlers.blocked)
        cancelled_at = time.monotonic()
        finish(call, sent)
        wait(handlers.left)
        assert time.monotonic() - cancelled_at < 2.0
        assert not handlers.went_on
        assert server.code() == "CANCELLED"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seconds", [0.3, 1.011])
def test_finally_runs_at_the_callers_deadline(kind, seconds):
    handlers = Blocked()
    with serving(kind, handlers) as server:
        grpc.channel_ready_future(server.channel).result(WAIT_SECONDS)
        call, sent = start(server, kind, timeout=seconds)
        wait(handlers.left)
        assert not handlers.went_on
        assert server.code() == "DEADLINE_EXCEEDED"
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        finish(call, sent)


def test_the_default_deadline_ends_a_handler_that_listens_for_it():
    handlers = Blocked(default_seconds=0.1)
    with serving("in_queue", handlers) as server:
        call, _ = start(server, "in_queue", timeout=None)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        wait(handlers.left)
        assert not handlers.went_on
        assert server.code() == "DEADLINE_EXCEEDED"
    back = error_from_rpc(caught.value)
    assert isinstance(back, DeadlineExceededError)
    assert back.message == "the deadline passed; allow more time or ask for fewer tokens"


@pytest.mark.parametrize("kind", ["at_yield", "in_next"])
def test_the_default_deadline_ends_a_handler_that_cannot_listen(kind, monkeypatch):
    monkeypatch.setattr(rpc_scope, "NOTICE_SECONDS", 0.1)
    handlers = Blocked(default_seconds=0.1)
    with serving(kind, handlers) as server:
        call, sent = start(server, kind, timeout=None)
        wait(handlers.left)
        assert not handlers.went_on
        assert server.code() == "DEADLINE_EXCEEDED"
        finish(call, sent)


@pytest.mark.parametrize(("timeout", "at_most"), [(None, 50.0), (7.0, 7.1), (200.0, 202.0)])
def test_the_callers_deadline_counts_and_the_default_where_there_is_none(timeout, at_most):
    seen = queue.SimpleQueue()

    def handler(request, context):
        with RpcScope(context, 50.0) as scope:
            seen.put((scope.seconds_remaining, scope.ended))
            scope.check()
        yield response()

    with served(handler) as server:
        list(server.generate(timeout))
    remaining, ended = seen.get_nowait()
    assert at_most - 5.0 < remaining <= at_most
    assert not ended


def test_a_scope_tells_apart_cancel_and_deadline_even_if_asked_late():
    running, over, asked = threading.Event(), threading.Event(), threading.Event()
    errors = queue.SimpleQueue()

    def handler(request, context):
        scope = RpcScope(context, 60.0)
        yield response()
        scope.on_end(over.set)
        running.set()
        wait(asked)
        try:
            scope.check()
        except SpectrumKVError as error:
            errors.put(type(error))
        errors.put(scope.ended)

    with served(handler) as server:
        call = server.generate(timeout=2.0)
        next(call)
        wait(running)
        call.cancel()
        wait(over)
        # Busy for longer than the deadline: it was a cancel all the same.
        deadline = threading.Event()
        timer = threading.Timer(2.2, deadline.set)
        timer.start()
        wait(deadline)
        timer.join()
        asked.set()
        assert errors.get(timeout=WAIT_SECONDS) is CancelledError
        assert errors.get(timeout=WAIT_SECONDS) is True


@pytest.mark.parametrize("ending", ["cancel", "finish", "default deadline"])
def test_on_end_calls_once_in_order_and_all_even_if_one_fails(ending, monkeypatch):
    calls = queue.SimpleQueue()
    over, reported = threading.Event(), threading.Event()
    # The default deadline's clock is a thread of Python's; what fails in gRPC's, gRPC logs.
    monkeypatch.setattr(threading, "excepthook", lambda _: reported.set())
    scopes = queue.SimpleQueue()

    def fail():
        calls.put("first")
        raise OSError("this callback fails")

    def handler(request, context):
        with RpcScope(context, 0.1 if ending == "default deadline" else 60.0) as scope:
            scopes.put(scope)
            scope.on_end(fail)
            scope.on_end(lambda: calls.put("second"))
            scope.on_end(over.set)
            yield response()
            if ending != "finish":
                wait(over)
                scope.check()

    with served(handler) as server:
        call = server.generate(timeout=None)
        next(call)
        if ending == "cancel":
            call.cancel()
        else:
            assert (ending == "finish") == (error_of(call) is None)
        wait(over)
        if ending == "default deadline":
            wait(reported)
        scope = scopes.get_nowait()
        assert [calls.get_nowait(), calls.get_nowait()] == ["first", "second"]
        scope.on_end(lambda: calls.put("at once"))
        assert calls.get_nowait() == "at once"
        assert server.code() == {"cancel": "CANCELLED", "finish": "OK"}.get(ending, "DEADLINE_EXCEEDED")
    assert calls.empty()


def error_of(call):
    try:
        list(call)
    except grpc.RpcError as error:
        return error
    return None


def test_registering_while_the_rpc_ends_loses_nothing():
    count, running, registered = 400, threading.Event(), threading.Event()
    calls = queue.SimpleQueue()

    def handler(request, context):
        with RpcScope(context, 60.0) as scope:
            yield response()
            running.set()
            for index in range(count):
                scope.on_end(lambda index=index: calls.put(index))
            registered.set()

    with served(handler) as server, ThreadPoolExecutor(1) as pool:
        call = server.generate()
        next(call)
        wait(running)
        pool.submit(call.cancel)
        wait(registered)
        assert sorted(calls.get(timeout=WAIT_SECONDS) for _ in range(count)) == list(range(count))
        assert calls.empty()


def test_leaving_a_scope_stops_its_clock():
    def handler(request, context):
        with RpcScope(context, 60.0):
            yield response()

    with served(handler) as server:
        list(server.generate(timeout=None))
        assert server.code() == "OK"
        clocks = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        for clock in clocks:
            clock.join(WAIT_SECONDS)
            assert not clock.is_alive()


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_a_system_clock_that_is_set_makes_no_deadline_of_a_cancel(monkeypatch, jump):
    handlers, now = Blocked(), time.time
    with served(handlers.in_queue) as server:
        call, _ = start(server, "in_queue", timeout=WAIT_SECONDS)
        wait(handlers.blocked)
        monkeypatch.setattr(time, "time", lambda: now() + jump)
        call.cancel()
        wait(handlers.left)
        assert server.code() == "CANCELLED"
