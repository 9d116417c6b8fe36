"""What prefill knows of a decode worker, from a scripted one over a real socket."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from spectrumkv.common.config import Address
from spectrumkv.common.decode_stream import SERVICE_NAME, add_decode_servicer
from spectrumkv.common.metrics import Metrics
from spectrumkv.common.rpc import Server
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.prefill_server import decode_worker
from spectrumkv.prefill_server.decode_worker import DecodeWorker
from spectrumkv.v1 import decode_pb2

WAIT_SECONDS = 20.0


class Scripted:
    """A decode service with 100 slots, 30 of them used; its streams stay open until they are let go."""

    def __init__(self) -> None:
        self.used = 30
        self.let_go = threading.Event()

    def Decode(self, requests: Any, context: Any) -> Iterator[Any]:  # noqa: N802  # gRPC's spelling
        yield decode_pb2.DecodeResponse(admitted=decode_pb2.Admitted(slots=1))
        self.let_go.wait(WAIT_SECONDS)

    def PutBasis(self, requests: Any, context: Any) -> Any:  # noqa: N802
        raise AssertionError("nobody sends a basis here")

    def GetServerInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
        return decode_pb2.DecodeServiceGetServerInfoResponse(slots_total=100, slots_used=self.used)


def serve(scripted: Scripted, address: str) -> tuple[Server, int]:
    server = Server(add_decode_servicer, scripted, SERVICE_NAME, threads=4, count_ended=lambda code: None)
    port = server.bind(address)
    server.start()
    return server, port


@contextmanager
def followed(port: int) -> Iterator[DecodeWorker]:
    metrics = Metrics(CollectorRegistry())
    worker = DecodeWorker(Address("127.0.0.1", port), ChannelSecurity(), metrics, on_change=lambda: None)
    try:
        yield worker
    finally:
        worker.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        threading.Event().wait(0.005)


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    one = Scripted()
    yield one
    one.let_go.set()


def test_it_counts_what_others_hold_and_what_this_process_holds(scripted: Scripted) -> None:
    server, port = serve(scripted, "127.0.0.1:0")
    with followed(port) as worker:
        until(lambda: worker.free_slots == 70)
        with worker.holding(50):
            # At once, without another answer.
            assert worker.free_slots <= 20
            # The answer that has them too does not count them twice.
            scripted.used = 80
            until(lambda: worker.free_slots == 20)
        scripted.used = 30
        until(lambda: worker.free_slots == 70)
    server.drain(0, threading.Event())


def test_one_that_shuts_down_is_expected_back_and_begins_another_life(scripted: Scripted) -> None:
    server, port = serve(scripted, "127.0.0.1:0")
    with followed(port) as worker:
        until(lambda: worker.accepting)
        assert worker.life == 1
        assert not worker.expected
        stream = worker.open_stream(iter([decode_pb2.DecodeRequest(begin={})]), timeout=WAIT_SECONDS)
        next(stream)
        draining = threading.Thread(target=server.drain, args=(WAIT_SECONDS, threading.Event()))
        draining.start()
        until(lambda: not worker.accepting)
        assert worker.expected
        assert worker.free_slots == 0
        scripted.let_go.set()
        draining.join()
        assert worker.expected
        successor, _ = serve(scripted, f"127.0.0.1:{port}")
        until(lambda: worker.accepting)
        assert worker.life == 2
        assert not worker.expected
        successor.drain(0, threading.Event())


def test_one_that_failed_a_request_is_asked_last_until_it_answers(scripted: Scripted) -> None:
    server, port = serve(scripted, "127.0.0.1:0")
    with followed(port) as worker:
        until(lambda: worker.accepting)
        worker.lost(leaving=False)
        assert not worker.expected
        until(lambda: worker.accepting and worker.life == 2)
    server.drain(0, threading.Event())


def test_one_that_was_never_there_is_expected_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    with followed(1) as worker:
        assert not worker.accepting
        assert worker.free_slots == 0
        assert worker.expected
        monkeypatch.setattr(decode_worker, "EXPECTED_SECONDS", 0.0)
        assert not worker.expected


def test_an_answer_without_a_message_is_none(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """What gRPC makes of a stream whose bytes were harmed."""
    monkeypatch.setattr(decode_worker, "decode_info_method", lambda channel: lambda request, timeout: None)
    server, port = serve(scripted, "127.0.0.1:0")
    with followed(port) as worker:
        until(lambda: worker._serving is True)
        assert not worker.accepting
        assert all(thread.is_alive() for thread in worker._threads)
    server.drain(0, threading.Event())
