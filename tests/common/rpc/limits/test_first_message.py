"""Calls that say nothing, or only a part of a message."""

import queue
import struct
import threading
from collections import Counter
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2

from spectrumkv.common.rpc import server as rpc
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.rpc.limits import first_message
from spectrumkv.v1 import prefill_pb2
from tests.common.rpc.scripted import HEALTH, WAIT_SECONDS, Served, echo, served
from tests.faults.connections.silent_streams import fill, silent_connections
from tests.waiting import until

GENERATE = "/spectrumkv.v1.PrefillService/Generate"
INFO = "/spectrumkv.v1.PrefillService/GetServerInfo"
TOKENIZE = "/spectrumkv.v1.PrefillService/Tokenize"
DETOKENIZE = "/spectrumkv.v1.PrefillService/Detokenize"
DECODE = "/spectrumkv.v1.DecodeService/Decode"
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
REFLECT = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNIMPLEMENTED = "4", "8", "12"
OK = "0"
# An empty message, whole.
WHOLE_MESSAGE = bytes(5)
# The length of a message of 1,000 bytes, and a few of them.
PART_OF_A_MESSAGE = b"\0\0\0\x03\xe8abc"


class Reasons:
    """Counts why silent calls were ended."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._changed = threading.Condition()

    def __call__(self, reason: str) -> None:
        with self._changed:
            self.counts[reason] += 1
            self._changed.notify_all()

    def wait_for(self, total: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.counts.total() >= total, WAIT_SECONDS), self.counts


def check(channel: grpc.Channel) -> bool:
    stub = rpc.health_pb2_grpc.HealthStub(channel)
    answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_SECONDS, wait_for_ready=True)
    return bool(answer.status == HEALTH.SERVING)


def assert_all_is_answered(server: Served) -> None:
    """Ask for everything, over a connection that may have been there before."""
    assert check(server.channel)
    assert next(server.watch()).status == HEALTH.SERVING
    request = prefill_pb2.PrefillServiceGetServerInfoRequest()
    assert server.prefill.GetServerInfo(request, timeout=WAIT_SECONDS).version == "1"
    assert [one.token.text for one in server.generate()] == ["yes"]


@pytest.mark.parametrize("data", [b"", PART_OF_A_MESSAGE], ids=["nothing", "a part"])
@pytest.mark.parametrize("method", [GENERATE, INFO, TOKENIZE, DETOKENIZE, CHECK, WATCH])
def test_a_silent_call_ends_in_time(monkeypatch: pytest.MonkeyPatch, method: str, data: bytes) -> None:
    monkeypatch.setattr(rpc, "FIRST_MESSAGE_SECONDS", 0.2)
    reasons = Reasons()
    with served(count_silent=reasons) as server, silent_connections(server.address, 1) as [connection]:
        connection.open(method, data)
        assert connection.ended.get(timeout=WAIT_SECONDS) == DEADLINE_EXCEEDED
        assert reasons.counts == {"time": 1}


@pytest.mark.parametrize("data", [b"", PART_OF_A_MESSAGE], ids=["nothing", "a part"])
def test_a_silent_question_of_reflection_ends_in_time(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(rpc, "FIRST_MESSAGE_SECONDS", 0.2)
    with served(reflection=True) as server, silent_connections(server.address, 1) as [connection]:
        connection.open(REFLECT, data)
        assert connection.ended.get(timeout=WAIT_SECONDS) == DEADLINE_EXCEEDED


@pytest.mark.parametrize("method", ["/spectrumkv.v1.PrefillService/Nothing", "/nobody/Nothing", "/", "//", "nothing"])
def test_a_silent_call_of_a_method_that_is_none_ends_at_once(method: str) -> None:
    with served() as server, silent_connections(server.address, 1) as [connection]:
        for _ in range(20):
            connection.open(method)
        assert {connection.ended.get(timeout=WAIT_SECONDS) for _ in range(20)} <= {UNIMPLEMENTED, "reset"}
        assert_all_is_answered(server)


def test_one_question_of_reflection_after_which_nothing_comes_takes_one_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stream may stay open after its first message; so many may, and no more."""
    monkeypatch.setattr(rpc, "WATCHERS", 4)
    whole = b"\0\0\0\0\x02\x3a\0"
    with served(reflection=True) as server, silent_connections(server.address, 2) as connections:
        for number in range(12):
            connections[number % 2].open(REFLECT, whole)
        until(lambda: sum(one.ended.qsize() for one in connections) == 8)
        assert [one.token.text for one in server.generate()] == ["yes"]
        assert check(server.channel)


def test_a_silent_stream_of_requests_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "FIRST_MESSAGE_SECONDS", 0.2)
    with served(echo, stream="Decode") as server, silent_connections(server.address, 1) as [connection]:
        connection.open(DECODE)
        assert connection.ended.get(timeout=WAIT_SECONDS) == DEADLINE_EXCEEDED


@pytest.mark.parametrize("method", [GENERATE, CHECK])
def test_a_silent_caller_is_told_why_its_call_ended(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(rpc, "FIRST_MESSAGE_SECONDS", 0.2)
    ended = threading.Event()

    def nothing() -> Iterator[bytes]:
        ended.wait(WAIT_SECONDS)
        yield from ()

    with served() as server:
        call = server.channel.stream_stream(method)(nothing(), timeout=WAIT_SECONDS)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        ended.set()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert caught.value.details() == (
        "the call's first message did not come within 0.2 s of its headers; send it with them"
    )


def test_who_gives_way_to_others_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "SILENT_CALLS", 2)
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()
    with served() as server, silent_connections(server.address, 3) as held:
        for one in held:
            one.ended = ended
            one.open(INFO)
        # The one whose headers were there first.
        assert ended.get(timeout=WAIT_SECONDS) == RESOURCE_EXHAUSTED


def test_who_is_about_to_speak_does_not_give_way_to_a_burst_of_silent_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server may not have read the message of the call that came first, and yet others are ended for more."""
    monkeypatch.setattr(rpc, "SILENT_CALLS", 4)
    monkeypatch.setattr(first_message, "GRACE_SECONDS", WAIT_SECONDS)
    reasons = Reasons()
    with served(count_silent=reasons) as server, silent_connections(server.address, 4) as [honest, *others]:
        call = honest.open(INFO)
        for _ in range(2):
            fill(others, (INFO,), 2)
        reasons.wait_for(3)
        assert set(reasons.counts) == {"all"}
        honest.feed(call, WHOLE_MESSAGE)
        assert honest.ended.get(timeout=WAIT_SECONDS) == OK


def test_a_call_waits_for_the_others_of_its_connection_to_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that begins many calls at once is not refused because the server has not read their messages yet."""
    monkeypatch.setattr(rpc, "SILENT_CALLS", 4)
    monkeypatch.setattr(first_message, "GRACE_SECONDS", WAIT_SECONDS)
    with served() as server, silent_connections(server.address, 1) as [connection]:
        first, _ = connection.open(INFO), connection.open(INFO)
        connection.open(INFO, WHOLE_MESSAGE)
        connection.feed(first, WHOLE_MESSAGE)
        assert [connection.ended.get(timeout=WAIT_SECONDS) for _ in range(2)] == [OK, OK]


def test_a_burst_of_calls_over_one_connection_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "SILENT_CALLS", 8)
    with served() as server:
        ask = server.channel.unary_unary(INFO)
        answers = [ask.future(b"", timeout=WAIT_SECONDS) for _ in range(200)]
        assert all(one.result() is not None for one in answers)


@pytest.mark.parametrize(
    "methods", [(CHECK,), (WATCH,), (INFO,), (GENERATE,), (TOKENIZE,), (CHECK, WATCH, INFO, GENERATE, DETOKENIZE)]
)
def test_a_thousand_silent_calls_take_nothing_from_others(methods: tuple[str, ...]) -> None:
    reasons = Reasons()
    with served(count_silent=reasons) as server, silent_connections(server.address, 10) as connections:
        fill(connections, methods, 100)
        reasons.wait_for(1000 - rpc.SILENT_CALLS - rpc.SILENT_WATCHERS)
        assert_all_is_answered(server)
        with open_channel(server.address) as another:
            assert check(another)
        assert reasons.counts["time"] == 0


def test_one_connection_cannot_take_all_places(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = Reasons()
    monkeypatch.setattr(rpc, "SILENT_CALLS", 16)
    with served(count_silent=reasons) as server, silent_connections(server.address, 1) as [connection]:
        fill([connection], (INFO,), 20)
        reasons.wait_for(12)
        assert reasons.counts == {"connection": 12}
        assert [connection.ended.get(timeout=WAIT_SECONDS) for _ in range(12)] == [RESOURCE_EXHAUSTED] * 12
        assert_all_is_answered(server)


@pytest.mark.parametrize(("most_bytes", "calls"), [(1 << 10, 256), (1 << 20, 256), (2 << 20, 128), (64 << 20, 32)])
def test_the_longer_messages_may_be_the_fewer_may_be_incomplete(most_bytes: int, calls: int) -> None:
    assert rpc.silent_call_limit(most_bytes) == calls


def test_parts_of_messages_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "PARTIAL_MESSAGE_BYTES", 1 << 20)
    monkeypatch.setattr(rpc, "FEWEST_SILENT_CALLS", 4)
    reasons = Reasons()
    part = struct.pack(">BI", 0, 100_000) + bytes(99_999)
    with (
        served(count_silent=reasons, most_message_bytes=100_000) as server,
        silent_connections(server.address, 3) as held,
    ):
        for number in range(24):
            connection = held[number % 3]
            connection.feed(connection.open(GENERATE), part)
        reasons.wait_for(24 - 10)
        assert_all_is_answered(server)


def test_silent_calls_of_health_take_no_places_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = Reasons()
    monkeypatch.setattr(rpc, "SILENT_WATCHERS", 4)
    with served(count_silent=reasons) as server, silent_connections(server.address, 2) as [own, other]:
        own.open(INFO)
        fill([other], (CHECK,), 50)
        reasons.wait_for(48)
        assert own.open_streams == 1
        assert_all_is_answered(server)


def test_a_call_without_its_message_is_refused() -> None:
    with served() as server:
        for call in (server.channel.stream_stream(GENERATE), server.channel.stream_stream(INFO)):
            with pytest.raises(grpc.RpcError) as caught:
                list(call(iter(()), timeout=WAIT_SECONDS))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("ask", ["Check", "Watch"])
def test_a_question_about_health_is_short(ask: str) -> None:
    """A watch keeps the name that it asked for, and needs no token."""
    with served() as server:
        stub = rpc.health_pb2_grpc.HealthStub(server.channel)
        question = health_pb2.HealthCheckRequest(service="x" * rpc.HEALTH_REQUEST_BYTES)
        with pytest.raises(grpc.RpcError) as refused:
            list(getattr(stub, ask)(question, timeout=WAIT_SECONDS))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert str(rpc.HEALTH_REQUEST_BYTES) in refused.value.details()


def test_a_message_that_is_none_is_refused() -> None:
    with served() as server:
        for method in (GENERATE, INFO, TOKENIZE, DETOKENIZE, CHECK):
            with pytest.raises(grpc.RpcError) as caught:
                list(server.channel.unary_stream(method)(b"\xff", timeout=WAIT_SECONDS))
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            assert caught.value.details() == "Exception deserializing request!"


def test_a_connection_has_no_more_calls_than_there_is_room_for() -> None:
    with served(threads=2) as server, silent_connections(server.address, 1) as [connection]:
        connection.open(INFO)
        assert check(server.channel)
        assert connection.stream_limit == 2 + rpc.EXTRA_STREAMS
