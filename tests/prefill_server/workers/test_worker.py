"""What prefill knows of a decode worker, from a scripted one over a real socket."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from spectrumkv.common.rpc.decode_methods import SERVICE_NAME, add_decode_servicer
from spectrumkv.common.rpc.server import Server
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.common.service.config import Address
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.prefill_server.workers import worker as decode_worker
from spectrumkv.prefill_server.workers.worker import DecodeWorker
from spectrumkv.v1 import decode_pb2, decode_pb2_grpc
from tests.waiting import WAIT_SECONDS, until


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
def followed(port: int, on_change: Callable[[], None] = lambda: None) -> Iterator[DecodeWorker]:
    metrics = Metrics(CollectorRegistry())
    worker = DecodeWorker(Address("127.0.0.1", port), ChannelSecurity(), metrics, on_change)
    worker.start()
    try:
        yield worker
    finally:
        worker.close()


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


def test_one_that_shuts_down_is_expected_back_and_begins_another_epoch(scripted: Scripted) -> None:
    server, port = serve(scripted, "127.0.0.1:0")
    with followed(port) as worker:
        until(lambda: worker.accepting)
        assert worker.epoch == 1
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
        assert worker.epoch == 2
        assert not worker.expected
        successor.drain(0, threading.Event())


def test_one_that_failed_a_request_is_asked_last_until_it_answers(scripted: Scripted) -> None:
    server, port = serve(scripted, "127.0.0.1:0")
    with followed(port) as worker:
        until(lambda: worker.accepting)
        worker.lost(leaving=False)
        assert not worker.expected
        until(lambda: worker.accepting and worker.epoch == 2)
    server.drain(0, threading.Event())


def test_one_that_was_never_there_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(decode_worker, "ROOM_SECONDS", 0.01)
    with followed(1):
        threading.Event().wait(0.1)
        assert caplog.messages == []
        monkeypatch.setattr(decode_worker, "LATE_SECONDS", 0.0)
        until(lambda: bool(caplog.messages))
        threading.Event().wait(0.1)
    assert caplog.messages == ["decode worker 127.0.0.1:1 does not answer yet"]


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


class ScriptedHealth(health_pb2_grpc.HealthServicer):
    """Says one thing to each watch, and ends it with a status once it is let go."""

    def __init__(self, says: int, ends_with: grpc.StatusCode) -> None:
        self._says, self._ends_with = says, ends_with
        self.watches = 0
        self.let_go = threading.Event()

    def Watch(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802  # gRPC's spelling
        self.watches += 1
        yield health_pb2.HealthCheckResponse(status=self._says)
        self.let_go.wait(WAIT_SECONDS)
        context.set_code(self._ends_with)


@contextmanager
def foreign(health: ScriptedHealth, asked: threading.Semaphore) -> Iterator[int]:
    """A decode worker that is not ours."""

    class Service(decode_pb2_grpc.DecodeServiceServicer):
        def GetServerInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
            asked.release()
            return decode_pb2.DecodeServiceGetServerInfoResponse(slots_total=1)

    server = grpc.server(ThreadPoolExecutor(4))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        health.let_go.set()
        server.stop(0).wait()


def test_a_watch_that_ends_in_order_is_not_begun_anew_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_worker, "PAUSE_SECONDS", 1000.0)
    monkeypatch.setattr(decode_worker, "ROOM_SECONDS", 0.01)
    health, asked = ScriptedHealth(health_pb2.HealthCheckResponse.SERVING, grpc.StatusCode.OK), threading.Semaphore(0)
    health.let_go.set()
    with foreign(health, asked) as port, followed(port) as worker:
        until(lambda: worker.accepting)
        for _ in range(20):
            assert asked.acquire(timeout=WAIT_SECONDS)
        assert health.watches == 1
        assert worker.accepting


def test_one_that_nobody_may_watch_any_more_begins_an_epoch_that_is_heard_of() -> None:
    health = ScriptedHealth(health_pb2.HealthCheckResponse.NOT_SERVING, grpc.StatusCode.UNIMPLEMENTED)
    # Each turns what was before around, from the first epoch on.
    changes: list[None] = []
    with foreign(health, threading.Semaphore(0)) as port, followed(port, lambda: changes.append(None)) as worker:
        until(lambda: health.watches > 0 and not worker.accepting)
        health.let_go.set()
        until(lambda: worker.accepting and len(changes) % 2 == 1)
        assert worker.epoch == (len(changes) + 1) // 2
        assert not worker.expected


def test_nothing_is_asked_before_the_start(scripted: Scripted) -> None:
    server, port = serve(scripted, "127.0.0.1:0")
    worker = DecodeWorker(Address("127.0.0.1", port), ChannelSecurity(), Metrics(CollectorRegistry()), lambda: None)
    assert not any(thread.is_alive() for thread in worker._threads)
    assert not worker.accepting
    # Closing needs no start.
    worker.close()
    server.drain(0, threading.Event())
