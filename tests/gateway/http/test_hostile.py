"""Hostile HTTP is refused in a sentence, and others notice nothing."""

import json
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest

from spectrumkv.common.service import machine
from spectrumkv.gateway.http import bodies, connection
from tests.client.fake_servers import FakePrefill, finished, token
from tests.gateway.running import WAIT_SECONDS, Answer, RunningGateway, running_gateway
from tests.waiting import until

IDLE_CONNECTIONS = 1000
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


def read_answer(sock: Any) -> Answer:
    """Read until the server closes the connection, as it must."""
    sock.settimeout(WAIT_SECONDS)
    received = b""
    while part := sock.recv(65536):
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    assert headers["connection"] == "close"
    return Answer(int(lines[0].split()[1]), headers, body)


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        (HEAD + b"X-Long: " + b"a" * (20 << 10), 431, "the headers are longer than 16384 bytes"),
        (HEAD + b"X-Many: a\r\n" * 2000, 431, "the headers are longer than 16384 bytes"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "this is no HTTP request"),
        (b"GET / HTTQ/1.1\r\n\r\n", 400, "this is no HTTP request"),
        (HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n", 400, "no HTTP"),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400, "this is no HTTP request"),
        (HEAD + b"bad header\r\n\r\n", 400, "this is no HTTP request"),
    ],
    ids=["long", "many", "tls", "version", "lengths", "negative", "colon"],
)
def test_bytes_that_are_no_request(gateway: RunningGateway, sent: bytes, status: int, said: str) -> None:
    with closing(gateway.socket()) as sock:
        sock.sendall(sent)
        answer = read_answer(sock)
    assert answer.status == status
    assert said in answer.error["message"]
    assert gateway.get("/health").status == 200


@pytest.mark.parametrize(
    "body",
    [
        {"x" * 100_000: 1},
        {"logit_bias": {"x" * 100_000: 1}},
        {"logit_bias": {"5" * 100_000: "no number"}},
        {"stream_options": {"x" * 100_000: 1}},
        {"model": ["x" * 100_000]},
    ],
    ids=lambda body: next(iter(body))[:14],
)
def test_long_names_are_not_sent_back_whole(gateway: RunningGateway, body: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "x"}]
    answer = gateway.ask("POST", "/v1/chat/completions", {"messages": messages, **body})
    assert answer.status == 400
    assert len(answer.body) < 2000


@pytest.mark.parametrize("sent", [b"", HEAD, b"G"], ids=["silent", "headers", "letter"])
def test_a_connection_that_sends_no_whole_request(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with closing(gateway.socket()) as sock:
        sock.sendall(sent)
        answer = read_answer(sock)
    assert (answer.status, answer.error["message"][:21]) == (408, "no whole request came")


def test_a_second_request_that_stops_in_its_headers(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(gateway.socket()) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in sock.recv(4096)
        monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
        sock.sendall(b"GET /hea")
        assert read_answer(sock).status == 408


def test_slow_headers_of_many_pieces_get_no_more_time(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.5)
    started = time.monotonic()
    with closing(gateway.socket()) as sock:
        sock.settimeout(0.1)
        received = b""
        while not received:
            sock.sendall(b"X")
            try:
                received = sock.recv(4096)
            except TimeoutError:
                assert time.monotonic() - started < WAIT_SECONDS
        assert b" 408 " in received


@pytest.mark.parametrize("head", [b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"])
def test_a_body_that_does_not_come(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, head: bytes) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.3)
    with closing(gateway.socket()) as sock:
        sock.sendall(HEAD + head)
        answer = read_answer(sock)
    assert answer.status == 408
    assert "the body did not come within 0.3 s (1 bytes had come)" in answer.error["message"]
    until(lambda: gateway.counted("other", 408) == 1)


@pytest.mark.parametrize("length", [1025, 5000, 100_000])
def test_a_body_that_is_too_long(prefill: FakePrefill, length: int) -> None:
    body = b'"' + b"a" * (length - 2) + b'"'
    with running_gateway(prefill.address, max_body="1024") as gateway, closing(gateway.socket()) as sock:
        sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        answer = read_answer(sock)
        assert (answer.status, answer.error["message"][:38]) == (413, "the body is longer than 1024 bytes, th")
        assert gateway.complete(model="m").status == 200


SLOW = b"Content-Length: 100\r\n\r\n{"


def test_slow_bodies_take_no_place(prefill: FakePrefill) -> None:
    with running_gateway(prefill.address, max_requests="1") as gateway, ExitStack() as opened:
        for _ in range(4):
            opened.enter_context(closing(gateway.socket())).sendall(HEAD + SLOW)
        assert gateway.complete(model="m").status == 200


@pytest.mark.parametrize("head", [HEAD, b"POST /health HTTP/1.1\r\nHost: x\r\n"], ids=["request", "open"])
def test_of_many_slow_bodies_the_first_makes_room(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, head: bytes
) -> None:
    monkeypatch.setattr(machine, "MAX_CONNECTIONS", 16)
    with ExitStack() as opened:
        first = opened.enter_context(closing(gateway.socket()))
        first.sendall(head + SLOW)
        # Each connection is busy, and so none that would be closed for another.
        for _ in range(8):
            opened.enter_context(closing(gateway.socket())).sendall(head + SLOW)
        assert gateway.complete(model="m").status == 200
        answer = read_answer(first)
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert "this one began first (1 bytes had come)" in answer.error["message"]


def test_bodies_on_their_way_have_bounded_memory(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_ARRIVING_BYTES", 100_000)
    head = HEAD + b"Content-Length: 90000\r\n\r\n"
    with closing(gateway.socket()) as first, closing(gateway.socket()) as second:
        for sock in (first, second):
            sock.sendall(head + b"a" * 60_000)
        assert read_answer(first).status == 503
        second.sendall(b"a" * 30_000)
        assert second.recv(12) == b"HTTP/1.1 400"


def test_a_path_without_a_body_reads_little_of_one(gateway: RunningGateway) -> None:
    with closing(gateway.socket()) as sock:
        sock.sendall(b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b"a" * 6000)
        answer = read_answer(sock)
    assert (answer.status, answer.error["message"][:38]) == (413, "the body is longer than 1024 bytes, th")


def test_a_caller_that_leaves_in_its_body(gateway: RunningGateway) -> None:
    with closing(gateway.socket()) as sock:
        sock.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
    until(lambda: gateway.counted("other", 499) == 1)


def test_more_requests_than_the_gateway_takes(prefill: FakePrefill) -> None:
    def answer(request: Any, context: Any) -> Any:
        yield token(0, "a")
        prefill.ended.wait(WAIT_SECONDS)
        yield finished(1)

    prefill.answer = answer
    with running_gateway(prefill.address, max_requests="1") as gateway, closing(gateway.connect()) as first:
        first.request("POST", "/v1/completions", b'{"prompt": "x", "model": "m", "stream": true}')
        with first.getresponse() as response:
            assert response.readline()
            refused = gateway.complete()
            assert (refused.status, refused.headers["retry-after"]) == (429, "1")
            assert "--max-requests" in refused.error["message"]
            assert gateway.get("/health").status == 200
            assert gateway.get("/metrics").status == 200
            prefill.ended.set()
            response.read()
        until(lambda: gateway.complete().status == 200)


@pytest.fixture
def many_files() -> Iterator[None]:
    """Let this process, which has both ends of every connection, open more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 < hard < 4 * IDLE_CONNECTIONS:
        pytest.skip(f"this process may open {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4 * IDLE_CONNECTIONS, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_a_thousand_idle_connections_disturb_nobody(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MAX_CONNECTIONS", IDLE_CONNECTIONS // 2)
    with ExitStack() as opened:
        idle = [opened.enter_context(closing(gateway.socket())) for _ in range(IDLE_CONNECTIONS)]
        slowest = 0.0
        for _ in range(20):
            started = time.monotonic()
            assert gateway.complete(model="m").status == 200
            slowest = max(slowest, time.monotonic() - started)
        # A connection that sends nothing lasts this long, so that whoever waits for one waits for longer.
        assert slowest < connection.HEAD_SECONDS / 2
        # The oldest ones made room, and were told so.
        answer = read_answer(idle[0])
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert "this one was idle for the longest" in answer.error["message"]
        assert json.loads(answer.body)


def test_a_running_request_is_never_the_one_that_makes_room(
    gateway: RunningGateway, prefill: FakePrefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "MAX_CONNECTIONS", 1)

    def answer(request: Any, context: Any) -> Any:
        yield token(0, "a")
        prefill.ended.wait(WAIT_SECONDS)
        yield finished(1)

    prefill.answer = answer
    with closing(gateway.connect()) as first, closing(gateway.socket()) as second:
        first.request("POST", "/v1/completions", b'{"prompt": "x", "model": "m", "stream": true}')
        with first.getresponse() as response:
            assert response.readline()
            with closing(gateway.socket()) as third:
                assert read_answer(second).status == 503
                assert read_answer(third).status == 503
            prefill.ended.set()
            assert response.read().endswith(b"data: [DONE]\n\n")
