"""Callers that read slowly, or nothing: what the gateway has for them keeps no connection."""

import socket
import time
from contextlib import closing
from typing import Any

import pytest

from spectrumkv.gateway.http import connection
from tests.client.fake_servers import FakePrefill, finished, token
from tests.gateway.http.test_hostile import HEAD
from tests.gateway.running import WAIT_SECONDS, RunningGateway
from tests.waiting import until


def test_a_caller_that_reads_nothing_is_cut_off(
    gateway: RunningGateway, prefill: FakePrefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.3)

    def answer(request: Any, context: Any) -> Any:
        for index in range(2000):
            if not context.is_active():
                return
            yield token(index, "a" * 65536)
        yield finished(2000)

    prefill.answer = answer
    body = b'{"prompt": "x", "model": "m", "stream": true}'
    with closing(gateway.socket()) as sock:
        sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert prefill.ended.wait(WAIT_SECONDS)
    until(lambda: gateway.counted("/v1/completions", 499) == 1)


def ask_and_read_nothing(gateway: RunningGateway, pages: int) -> socket.socket:
    """Ask for the page's script again and again over one connection, and read none of it."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.connect(("127.0.0.1", gateway.port))
    sock.sendall(b"GET /page/page.js HTTP/1.1\r\nHost: x\r\n\r\n" * pages)
    return sock


# Of fewer the system may take all: then nothing is left, and the connection is idle.
@pytest.mark.parametrize("pages", [1000, 1001, 1010])
def test_no_rest_of_an_answer_keeps_a_connection(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, pages: int
) -> None:
    """However much of the answers the system took: what is left of them may be any part."""
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with closing(ask_and_read_nothing(gateway, pages)):
        until(lambda: not any_connection(gateway))


def any_connection(gateway: RunningGateway) -> bool:
    return bool(gateway.metrics.registry.get_sample_value("spectrumkv_gateway_connections"))


def test_a_slow_reader_keeps_its_connection_for_as_long_as_it_reads(
    gateway: RunningGateway, prefill: FakePrefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.4)

    def answer(request: Any, context: Any) -> Any:
        yield token(0, "a" * (3 << 20), ends="STOP")
        yield finished(1)

    prefill.answer = answer
    started = time.monotonic()
    with closing(socket.socket()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        sock.settimeout(WAIT_SECONDS)
        sock.connect(("127.0.0.1", gateway.port))
        body = b'{"prompt": "x", "model": "m"}'
        sock.sendall(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        size = 0
        while part := sock.recv(64 << 10):
            size += len(part)
            # A link of some 1.5 MB/s; nothing is waited for.
            time.sleep(0.04)
    assert size > 3 << 20
    assert time.monotonic() - started > 3 * connection.STALL_SECONDS
