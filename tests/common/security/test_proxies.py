"""Proxies that the environment names: loopback and decode's traffic never go there."""

import contextlib
import queue
import socket
import threading
from collections.abc import Iterator

import grpc
import pytest

from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.common.service.config import Address, PrefillConfig, build
from spectrumkv.v1 import prefill_pb2, prefill_pb2_grpc
from tests.common.rpc.scripted import WAIT_SECONDS, served

TOKEN = "a-token-that-no-proxy-should-see"
# An address of nobody (RFC 5737), which only a proxy would pretend to reach.
ELSEWHERE = "192.0.2.1:50052"


@contextlib.contextmanager
def proxy() -> Iterator[tuple[str, "queue.SimpleQueue[bytes]"]]:
    """A proxy that hangs up; yields its address and the first bytes of each connection."""
    seen: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    seen.put(connection.recv(1 << 16))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


NAMES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator["queue.SimpleQueue[bytes]"]:
    """What a proxy sees that all variables name, whether in small letters or in capitals."""
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with proxy() as (address, connections):
        for name in (*NAMES, *map(str.upper, NAMES)):
            monkeypatch.setenv(name, address)
        yield connections


HERE = ("127.0.0.1", "localhost", "LocalHost", "0.0.0.0", "[::ffff:127.0.0.1]")


@pytest.mark.parametrize("host", HERE)
def test_loopback_goes_directly(monkeypatch: pytest.MonkeyPatch, seen: "queue.SimpleQueue[bytes]", host: str) -> None:
    monkeypatch.setenv("SPECTRUMKV_TOKEN", TOKEN)
    with served() as server:
        address = f"{host}:{server.address.rpartition(':')[2]}"
        with open_channel(address, ChannelSecurity(allow_plaintext=True)) as channel:
            stub = prefill_pb2_grpc.PrefillServiceStub(channel)
            answers = stub.Generate(prefill_pb2.GenerateRequest(), timeout=WAIT_SECONDS)
            assert [one.token.text for one in answers] == ["yes"]
    assert seen.empty()


def test_several_servers_are_reached_directly(
    monkeypatch: pytest.MonkeyPatch, seen: "queue.SimpleQueue[bytes]"
) -> None:
    """A proxy is told one address, and would be told the whole list."""
    monkeypatch.setenv("SPECTRUMKV_TOKEN", TOKEN)
    with (
        served() as server,
        open_channel(f"{server.address},{ELSEWHERE}", ChannelSecurity(allow_plaintext=True)) as one,
    ):
        stub = prefill_pb2_grpc.PrefillServiceStub(one)
        answers = stub.Generate(prefill_pb2.GenerateRequest(), timeout=WAIT_SECONDS, wait_for_ready=True)
        assert [one.token.text for one in answers] == ["yes"]
    assert seen.empty()


def test_an_exception_for_other_hosts_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, seen: "queue.SimpleQueue[bytes]"
) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.setenv(name, "example.com")
    test_loopback_goes_directly(monkeypatch, seen, "127.0.0.1")
    test_decode_is_reached_directly(seen)


def test_decode_is_reached_directly(seen: "queue.SimpleQueue[bytes]") -> None:
    config = build(PrefillConfig, {"decode": ELSEWHERE, "allow_plaintext": True})
    with pytest.raises(grpc.RpcError):
        ask(ChannelSecurity.to_decode(config))
    assert seen.empty()


def test_a_client_reaches_another_machine_through_the_proxy(seen: "queue.SimpleQueue[bytes]") -> None:
    with pytest.raises(grpc.RpcError):
        ask(ChannelSecurity(allow_plaintext=True))
    assert seen.get(timeout=WAIT_SECONDS).startswith(b"CONNECT 192.0.2.1")


def ask(security: ChannelSecurity) -> None:
    with open_channel(ELSEWHERE, security) as channel:
        stub = prefill_pb2_grpc.PrefillServiceStub(channel)
        list(stub.Generate(prefill_pb2.GenerateRequest(), timeout=1))


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.8.9.10", True),
        ("[::1]", True),
        ("[::]", True),
        ("[::ffff:127.0.0.1]", True),
        ("localhost.", True),
        ("prefill.localhost", True),
        ("ip6-localhost", True),
        ("128.0.0.1", False),
        ("[::ffff:10.0.0.1]", False),
        ("localhost.example.com", False),
        ("notlocalhost", False),
    ],
)
def test_names_and_addresses_of_this_machine(host: str, here: bool) -> None:
    assert Address.parse(f"{host}:1").leads_here is here
