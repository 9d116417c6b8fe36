"""A server of gRPC that has too many calls waiting drops some, with CANCELLED: they are made again."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2_grpc

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.request import Sampling, TokenIds
from spectrumkv.common.errors import CancelledError, UnavailableError
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.rpc.status import error_from_rpc
from tests.common.rpc.scripted import WAIT_SECONDS

METHODS = {
    "Generate": "/spectrumkv.v1.PrefillService/Generate",
    "GetServerInfo": "/spectrumkv.v1.PrefillService/GetServerInfo",
    "Decode": "/spectrumkv.v1.DecodeService/Decode",
}
# gRPC makes a call so often in all.
ATTEMPTS = 5


class Dropping(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no type information
    """Drops the first calls of each method as gRPC's core does, and echoes the messages of the others."""

    def __init__(self, dropped: int) -> None:
        self.dropped = dropped
        self.calls = 0

    def service(self, details: Any) -> Any:
        return grpc.stream_stream_rpc_method_handler(self._answer) if details.method in METHODS.values() else None

    def _answer(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        self.calls += 1
        if self.calls <= self.dropped:
            context.abort(grpc.StatusCode.CANCELLED, "")
        yield from requests


@contextmanager
def dropping(calls: int) -> Iterator[tuple[Dropping, str]]:
    handler = Dropping(calls)
    server = grpc.server(ThreadPoolExecutor(4), handlers=[handler])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    # Where there are several servers, gRPC asks none whose health it does not know.
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    server.start()
    try:
        yield handler, address
    finally:
        server.stop(0).wait()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("several", [False, True], ids=["one server", "two servers"])
def test_a_dropped_call_is_made_again_with_its_messages(method: str, several: bool) -> None:
    with dropping(2) as (handler, address):
        with open_channel(f"{address},{address}" if several else address) as channel:
            call = channel.stream_stream(METHODS[method])(iter([b"one", b"two"]), timeout=WAIT_SECONDS)
            assert list(call) == [b"one", b"two"]
        assert handler.calls == 3


def test_a_call_that_is_dropped_again_and_again_is_unavailable() -> None:
    with dropping(ATTEMPTS) as (handler, address), SpectrumClient(address) as client:
        with pytest.raises(UnavailableError, match="too many calls wait for it, or it is stopping"):
            client.generate(TokenIds((1, 2)), sampling=Sampling(max_tokens=1), timeout=WAIT_SECONDS).result()
        assert handler.calls == ATTEMPTS


def test_a_call_that_its_caller_cancelled_is_not_made_again() -> None:
    with dropping(0) as (handler, address), open_channel(address) as channel:
        call = channel.stream_stream(METHODS["Decode"])(iter([b"one"]), timeout=WAIT_SECONDS)
        assert next(call) == b"one"
        call.cancel()
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        assert isinstance(error_from_rpc(caught.value), CancelledError)
        assert handler.calls == 1
