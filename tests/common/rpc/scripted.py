"""Services whose handlers are given functions, behind a real socket."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.rpc.server import Server
from spectrumkv.v1 import decode_pb2, decode_pb2_grpc, generation_pb2, prefill_pb2, prefill_pb2_grpc

WAIT_SECONDS = 20.0
HEALTH = health_pb2.HealthCheckResponse

Handler = Callable[[Any, grpc.ServicerContext], Any]


def response(text: str = "") -> prefill_pb2.GenerateResponse:
    return prefill_pb2.GenerateResponse(token=generation_pb2.Token(text=text))


def answer(request: Any, context: Any) -> Iterator[prefill_pb2.GenerateResponse]:
    yield response("yes")


class _Prefill(prefill_pb2_grpc.PrefillServiceServicer):
    def __init__(self, generate: Handler, info: Handler) -> None:
        self.Generate = generate
        self.GetServerInfo = info


class _Decode(decode_pb2_grpc.DecodeServiceServicer):
    def __init__(self, decode: Handler) -> None:
        self.Decode = decode


def echo(requests: Iterator[decode_pb2.DecodeRequest], context: Any) -> Iterator[decode_pb2.DecodeResponse]:
    for _ in requests:
        yield decode_pb2.DecodeResponse()


def server_info(request: Any, context: Any) -> prefill_pb2.PrefillServiceGetServerInfoResponse:
    return prefill_pb2.PrefillServiceGetServerInfoResponse(version="1")


@dataclass
class Served:
    """A running server, a channel to it, and the codes that it counted."""

    server: Server
    address: str
    channel: grpc.Channel
    codes: "queue.SimpleQueue[str]"

    @property
    def prefill(self) -> Any:
        return prefill_pb2_grpc.PrefillServiceStub(self.channel)

    @property
    def decode(self) -> Any:
        return decode_pb2_grpc.DecodeServiceStub(self.channel)

    @property
    def health(self) -> Any:
        return health_pb2_grpc.HealthStub(self.channel)

    def generate(self, timeout: float | None = WAIT_SECONDS) -> Any:
        return self.prefill.Generate(prefill_pb2.GenerateRequest(), timeout=timeout)

    def code(self) -> str:
        """The next code counted, which must be the only one."""
        code = self.codes.get(timeout=WAIT_SECONDS)
        assert self.codes.empty()
        return code

    def watch(self) -> Any:
        return self.health.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_SECONDS)


def make_server(
    handler: Handler = answer,
    *,
    stream: str = "Generate",
    info: Handler = server_info,
    threads: int = 4,
    reflection: bool = False,
    codes: "queue.SimpleQueue[str] | None" = None,
    count_silent: Callable[[str], None] = lambda reason: None,
    count_closed: Callable[[], None] = lambda: None,
    most_message_bytes: int = 1 << 20,
    connections_per_address: int | None = None,
    connection_seconds: float | None = None,
) -> Server:
    counted = queue.SimpleQueue() if codes is None else codes
    add, servicer, name = (
        (prefill_pb2_grpc.add_PrefillServiceServicer_to_server, _Prefill(handler, info), "PrefillService")
        if stream == "Generate"
        else (decode_pb2_grpc.add_DecodeServiceServicer_to_server, _Decode(handler), "DecodeService")
    )
    return Server(
        add,
        servicer,
        f"spectrumkv.v1.{name}",
        threads=threads,
        count_ended=counted.put,
        count_silent=count_silent,
        count_closed=count_closed,
        reflection_enabled=reflection,
        most_message_bytes=most_message_bytes,
        connections_per_address=connections_per_address,
        connection_seconds=connection_seconds,
    )


@contextmanager
def served(handler: Handler = answer, **options: Any) -> Iterator[Served]:
    codes: queue.SimpleQueue[str] = queue.SimpleQueue()
    server = make_server(handler, codes=codes, **options)
    address = f"127.0.0.1:{server.bind('127.0.0.1:0')}"
    server.start()
    channel = open_channel(address)
    try:
        yield Served(server, address, channel, codes)
    finally:
        channel.close()
        server.drain(0, threading.Event())


def wait(event: threading.Event) -> None:
    assert event.wait(WAIT_SECONDS), "it did not happen"
