"""What reaches the port of the metrics and is no scrape."""

import contextlib
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from spectrumkv.common.service.config import Address
from spectrumkv.common.telemetry import metrics_server
from spectrumkv.common.telemetry.metrics import Metrics
from tests.faults.deployment import until

WAIT_SECONDS = 20.0


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


@pytest.fixture
def port(metrics: Metrics) -> int:
    return metrics.serve(Address("127.0.0.1", 0))


def closed(metrics: Metrics, reason: str) -> float:
    return metrics.registry.get_sample_value("spectrumkv_connections_closed_total", {"reason": reason}) or 0.0


def scrape(port: int) -> bool:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=WAIT_SECONDS) as answer:
        return b"spectrumkv_requests_running" in answer.read()


@contextlib.contextmanager
def half_open(port: int, count: int, data: bytes) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as held:
        connections = []
        for _ in range(count):
            one = held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=WAIT_SECONDS))
            one.sendall(data)
            connections.append(one)
        yield connections


@pytest.mark.slow
@pytest.mark.parametrize("data", [b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\nX-Slow: "])
def test_half_open_connections_hold_no_more_threads_than_there_are_for_them(
    port: int, metrics: Metrics, data: bytes
) -> None:
    before = threading.active_count()
    with half_open(port, 200, data) as connections:
        assert scrape(port)
        for one in connections[: -metrics_server.CONNECTIONS]:
            assert hung_up(one)
        until(lambda: threading.active_count() <= before + metrics_server.CONNECTIONS, WAIT_SECONDS, "threads end")
        assert scrape(port)
        assert closed(metrics, "metrics") >= 200 - metrics_server.CONNECTIONS


@pytest.mark.parametrize("data", [b"", b"GET /metrics HTTP/1.1\r\n"])
def test_a_silent_connection_is_closed_in_time(
    monkeypatch: pytest.MonkeyPatch, port: int, metrics: Metrics, capfd: pytest.CaptureFixture[str], data: bytes
) -> None:
    monkeypatch.setattr(metrics_server, "SILENCE_SECONDS", 0.2)
    with half_open(port, 1, data) as [one]:
        assert hung_up(one)
    until(lambda: closed(metrics, "metrics_silent") == 1, WAIT_SECONDS, "it is counted")
    assert capfd.readouterr().err == ""


def hung_up(connection: socket.socket) -> bool:
    """Wait until the server closes a connection; it may refuse the part of a request that it has."""
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(1 << 16):
            pass
    return True


def test_probes_are_answered_beside_the_metrics() -> None:
    ready = False
    port = Metrics(CollectorRegistry()).serve(
        Address("127.0.0.1", 0), {"/live": lambda: True, "/ready": lambda: ready}
    )
    assert probe(port, "/live") == 200
    assert probe(port, "/ready") == 503
    ready = True
    assert probe(port, "/ready") == 200
    assert scrape(port)


def probe(port: int, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=WAIT_SECONDS) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
