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
from spectrumkv.common.service.config import PrefillConfig, build
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


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator["queue.SimpleQueue[bytes]"]:
    """What a proxy sees that all three variables name."""
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with proxy() as (address, connections):
        for name in ("http_proxy", "https_proxy", "grpc_proxy"):
            monkeypatch.setenv(name, address)
        yield connections


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_goes_directly(monkeypatch: pytest.MonkeyPatch, seen: "queue.SimpleQueue[bytes]", host: str) -> None:
    monkeypatch.setenv("SPECTRUMKV_TOKEN", TOKEN)
    with served() as server:
        address = f"{host}:{server.address.rpartition(':')[2]}"
        with open_channel(address) as channel:
            stub = prefill_pb2_grpc.PrefillServiceStub(channel)
            answers = stub.Generate(prefill_pb2.GenerateRequest(), timeout=WAIT_SECONDS)
            assert [one.token.text for one in answers] == ["yes"]
    assert seen.empty()


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
