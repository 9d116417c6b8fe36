"""A scripted server that is guarded, and callers of it."""

import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.common.errors import SpectrumKVError
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.rpc.server import Server
from spectrumkv.common.rpc.status import error_from_rpc
from spectrumkv.common.security import ChannelSecurity, ServerSecurity
from spectrumkv.v1 import prefill_pb2, prefill_pb2_grpc
from tests.common.rpc.scripted import WAIT_SECONDS, Handler, answer, server_info


class _Prefill(prefill_pb2_grpc.PrefillServiceServicer):
    def __init__(self, generate: Handler) -> None:
        self.Generate = generate
        self.GetServerInfo = server_info


@dataclass(frozen=True)
class Guarded:
    address: str
    codes: list[str]

    def channel(self, security: ChannelSecurity) -> grpc.Channel:
        return open_channel(self.address, security)

    def ask(self, security: ChannelSecurity) -> str:
        """One request on a connection of its own."""
        with self.channel(security) as channel:
            return texts(channel)

    def refusal(self, security: ChannelSecurity) -> SpectrumKVError:
        with pytest.raises(grpc.RpcError) as caught:
            self.ask(security)
        return error_from_rpc(caught.value)

    def client(self, security: ChannelSecurity) -> SpectrumClient:
        return SpectrumClient(self.address, security)


def start(channel: grpc.Channel) -> Any:
    return prefill_pb2_grpc.PrefillServiceStub(channel).Generate(prefill_pb2.GenerateRequest(), timeout=WAIT_SECONDS)


def texts(channel: grpc.Channel) -> str:
    return "".join(one.token.text for one in start(channel))


@contextmanager
def relay(target: str) -> Iterator[tuple[str, "queue.SimpleQueue[None]"]]:
    """Pass connections on to `target`; yields where, and a queue that tells of each one that its caller closed."""
    hung_up: queue.SimpleQueue[None] = queue.SimpleQueue()
    host, port = target.split(":")

    def pump(source: socket.socket, sink: socket.socket, from_caller: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        if from_caller:
            hung_up.put(None)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)
        source.close()

    def accept() -> None:
        with suppress(OSError):
            while True:
                caller, server = listener.accept()[0], socket.create_connection((host, int(port)))
                for both in ((caller, server, True), (server, caller, False)):
                    threading.Thread(target=pump, args=both, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", hung_up
        listener.shutdown(socket.SHUT_RDWR)


@contextmanager
def guarded(security: ServerSecurity, handler: Handler = answer, reflection: bool = False) -> Iterator[Guarded]:
    codes: list[str] = []
    server = Server(
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server,
        _Prefill(handler),
        "spectrumkv.v1.PrefillService",
        threads=4,
        count_ended=codes.append,
        reflection_enabled=reflection,
        security=security,
    )
    port = server.bind("127.0.0.1:0")
    server.start()
    try:
        yield Guarded(f"127.0.0.1:{port}", codes)
    finally:
        server.drain(0, threading.Event())
