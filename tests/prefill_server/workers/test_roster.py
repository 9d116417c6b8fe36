"""Which decode workers there are while names gain and lose addresses: scripted answers, real workers on 127.0.0.x."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from prometheus_client import CollectorRegistry

from spectrumkv.common.rpc.decode_methods import SERVICE_NAME, add_decode_servicer, decode_info_method
from spectrumkv.common.rpc.server import Server
from spectrumkv.common.security import ChannelSecurity, ServerSecurity, TlsFiles
from spectrumkv.common.service.config import Address
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.prefill_server.workers import names
from spectrumkv.prefill_server.workers.pool import WorkerPool
from spectrumkv.prefill_server.workers.worker import DecodeWorker
from spectrumkv.v1 import decode_pb2
from tests.common.security.certificates import Authority
from tests.waiting import WAIT_SECONDS, until

NAME = Address("decode.example", 50052)
LOOK_UP_SECONDS = 0.01


class Decode:
    """A decode service that has room and gets no requests."""

    def Decode(self, requests: Any, context: Any) -> Iterator[Any]:  # noqa: N802  # gRPC's spelling
        raise AssertionError("nobody sends a request here")

    def PutBasis(self, requests: Any, context: Any) -> Any:  # noqa: N802
        raise AssertionError("nobody sends a basis here")

    def GetServerInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
        return decode_pb2.DecodeServiceGetServerInfoResponse(slots_total=100)


class Names:
    """Answers look-ups by script, and counts them."""

    def __init__(self, *hosts: str) -> None:
        self.hosts: tuple[str, ...] | None = hosts
        self.asked = 0

    def __call__(self, name: Address) -> frozenset[Address]:
        self.asked += 1
        if self.hosts is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return frozenset(Address(host, name.port) for host in self.hosts)

    def until_taken_in(self) -> None:
        """Wait until an answer that began after this call has been taken in."""
        asked = self.asked
        until(lambda: self.asked > asked + 1)


@pytest.fixture
def port() -> Iterator[int]:
    """A port on which two decode services serve, at 127.0.0.2 and 127.0.0.3, as pods do."""
    servers = []
    port = 0
    for host in ("127.0.0.2", "127.0.0.3"):
        server = Server(add_decode_servicer, Decode(), SERVICE_NAME, threads=4, count_ended=lambda code: None)
        port = server.bind(f"{host}:{port}")
        server.start()
        servers.append(server)
    yield port
    for server in servers:
        server.drain(0, threading.Event())


@contextmanager
def pool_of(
    targets: list[Address],
    look_up: Names,
    security: ChannelSecurity = ChannelSecurity(),  # noqa: B008  # frozen
) -> Iterator[tuple[WorkerPool, Metrics, list[str]]]:
    metrics = Metrics(CollectorRegistry())
    gone: list[str] = []
    pool = WorkerPool(targets, security, metrics, None, LOOK_UP_SECONDS, gone.append, look_up)
    pool.start()
    try:
        yield pool, metrics, gone
    finally:
        pool.close()


def taking(pool: WorkerPool) -> set[str]:
    return {worker.address.host for worker in pool.ranked(slots=0) if worker.accepting}


def resolved(metrics: Metrics, name: Address) -> float | None:
    return metrics.registry.get_sample_value("spectrumkv_decode_name_resolved", {"name": str(name)})


def workers_shown(metrics: Metrics) -> int:
    return sum(
        len(family.samples)
        for family in metrics.registry.collect()
        if family.name in ("spectrumkv_decode_worker_accepting", "spectrumkv_decode_worker_slots_free")
    )


def test_workers_come_and_go_with_the_addresses_of_a_name(port: int) -> None:
    look_up = Names("127.0.0.2")
    with pool_of([Address(NAME.host, port)], look_up) as (pool, metrics, gone):
        until(lambda: taking(pool) == {"127.0.0.2"})
        look_up.hosts = ("127.0.0.2", "127.0.0.3")
        until(lambda: taking(pool) == {"127.0.0.2", "127.0.0.3"})
        look_up.hosts = ("127.0.0.3",)
        until(lambda: gone == [f"127.0.0.2:{port}"])
        assert taking(pool) == {"127.0.0.3"}
        # No series stays behind: they would alert for ever.
        assert workers_shown(metrics) == 2
        look_up.hosts = ("127.0.0.2", "127.0.0.3")
        until(lambda: taking(pool) == {"127.0.0.2", "127.0.0.3"})


def test_one_that_leaves_keeps_its_requests_and_gets_no_more(port: int) -> None:
    look_up = Names("127.0.0.2", "127.0.0.3")
    with pool_of([Address(NAME.host, port)], look_up) as (pool, _, gone):
        until(lambda: len(taking(pool)) == 2)
        worker = next(one for one in pool.ranked(slots=0) if one.address.host == "127.0.0.2")
        with worker.holding(10):
            look_up.hosts = ("127.0.0.3",)
            until(lambda: worker.leaving)
            assert [one.address.host for one in pool.ranked(slots=0)] == ["127.0.0.3"]
            look_up.until_taken_in()
            assert worker.accepting
            assert gone == []
            # The pod's address is back before its last request has ended.
            look_up.hosts = ("127.0.0.2", "127.0.0.3")
            until(lambda: not worker.leaving)
            look_up.hosts = ("127.0.0.3",)
            until(lambda: worker.leaving)
        until(lambda: gone == [str(worker.address)])
        # A request that chose the worker just before is refused, and goes on to another one.
        assert worker.retire()
        with pytest.raises(Exception, match="has left"):
            worker.open_lease(None, None)  # type: ignore[arg-type]  # refused before they are looked at


def test_a_name_that_does_not_resolve_keeps_its_workers_and_warns_once(
    port: int, caplog: pytest.LogCaptureFixture
) -> None:
    look_up, name = Names("127.0.0.2"), Address(NAME.host, port)
    with pool_of([name], look_up) as (pool, metrics, gone):
        until(lambda: taking(pool) == {"127.0.0.2"})
        assert resolved(metrics, name) == 1
        look_up.hosts = None
        until(lambda: resolved(metrics, name) == 0)
        look_up.until_taken_in()
        assert taking(pool) == {"127.0.0.2"}
        assert gone == []
        assert pool.unresolved == []
        (warning,) = [message for message in caplog.messages if "does not resolve" in message]
        assert warning.startswith("decode.example of --decode does not resolve: Name or service not known; workers")
        look_up.hosts = ("127.0.0.2",)
        until(lambda: resolved(metrics, name) == 1)


def test_a_name_that_was_never_found_costs_the_others_nothing(port: int) -> None:
    look_up = Names()
    look_up.hosts = None
    with pool_of([NAME, Address("127.0.0.2", port)], look_up) as (pool, _, _):
        until(lambda: taking(pool) == {"127.0.0.2"})
        until(lambda: pool.unresolved == ["decode.example does not resolve: Name or service not known"])
        # Nobody waits for the name.
        assert not pool.any_expected
        assert pool.known == [Address("127.0.0.2", port), NAME]
        assert pool.away == [NAME]


def test_a_first_request_waits_for_names_where_there_is_no_worker() -> None:
    look_up = Names()
    look_up.hosts = None
    with pool_of([NAME], look_up) as (pool, _, _):
        assert pool.ranked(slots=0) == []
        assert pool.any_expected


def test_an_address_that_is_given_and_found_is_one_worker_and_stays(port: int) -> None:
    look_up = Names("127.0.0.2", "127.0.0.3")
    with pool_of([Address(NAME.host, port), Address("127.0.0.2", port)], look_up) as (pool, _, gone):
        until(lambda: taking(pool) == {"127.0.0.2", "127.0.0.3"})
        look_up.hosts = ("127.0.0.3",)
        look_up.until_taken_in()
        assert taking(pool) == {"127.0.0.2", "127.0.0.3"}
        assert gone == []


def test_an_address_that_may_not_be_used_is_an_error_told_once(port: int, caplog: pytest.LogCaptureFixture) -> None:
    # Of nobody (RFC 5737), and plaintext may not leave this machine.
    look_up = Names("192.0.2.1", "127.0.0.2")
    with pool_of([Address(NAME.host, port)], look_up) as (pool, _, _):
        until(lambda: taking(pool) == {"127.0.0.2"})
        look_up.until_taken_in()
        assert len([message for message in caplog.messages if "cannot be used" in message]) == 1


def test_look_ups_find_what_the_machine_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert names.resolve(Address("localhost", 7)) <= {Address("127.0.0.1", 7), Address("[::1]", 7)}
    both = [(socket.AF_INET6, 1, 6, "", ("2001:db8::1", 7, 0, 0)), (socket.AF_INET, 1, 6, "", ("192.0.2.1", 7))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, type: both)
    # A pod with an address of each kind is one worker.
    assert names.resolve(Address("pod", 7)) == {Address("192.0.2.1", 7)}
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, type: both[:1])
    assert names.resolve(Address("pod", 7)) == {Address("[2001:db8::1]", 7)}


@pytest.mark.parametrize(("certified", "trusted"), [(NAME.host, True), ("another.example", False)])
def test_tls_verifies_the_name_and_not_the_address(tmp_path: Path, certified: str, trusted: bool) -> None:
    authority = Authority("roster")
    files = authority.issue(names=(x509.DNSName(certified),)).write(tmp_path, authority)
    server = Server(
        add_decode_servicer,
        Decode(),
        SERVICE_NAME,
        threads=4,
        count_ended=lambda code: None,
        security=ServerSecurity(files),
    )
    port = server.bind("127.0.0.2:0")
    server.start()
    security = ChannelSecurity(TlsFiles(ca=files.ca), allow_proxy=False)
    look_up = Names("127.0.0.2")
    with pool_of([Address(NAME.host, port)], look_up, security) as (pool, _, _):
        if trusted:
            until(lambda: taking(pool) == {"127.0.0.2"})
        else:
            (worker,) = until_known(pool)
            info = decode_info_method(worker.channel)
            with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
                info(decode_pb2.DecodeServiceGetServerInfoRequest(), timeout=WAIT_SECONDS)
    server.drain(0, threading.Event())


def until_known(pool: WorkerPool) -> list[DecodeWorker]:
    until(lambda: bool(pool.ranked(slots=0)))
    return pool.ranked(slots=0)
