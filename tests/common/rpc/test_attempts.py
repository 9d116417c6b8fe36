"""A server of gRPC that has too many calls waiting drops some, with CANCELLED: they are made again."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2_grpc

from spectrumkv.client.async_client import AsyncSpectrumClient
from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.request import Request, Sampling
from spectrumkv.common.errors import CancelledError, SpectrumKVError, UnavailableError
from spectrumkv.common.rpc.attempts import ATTEMPTS
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.v1 import generation_pb2, prefill_pb2
from tests.common.rpc.scripted import WAIT_SECONDS

SERVICE = "/spectrumkv.v1.PrefillService/"
REQUEST = Request(prompt="Hello", sampling=Sampling(max_tokens=1))
TOKEN = prefill_pb2.GenerateResponse(token=generation_pb2.Token(text="yes")).SerializeToString()
FINISHED = prefill_pb2.GenerateResponse(finished=prefill_pb2.GenerateFinished()).SerializeToString()


class Failing(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no type information
    """Ends the first calls as gRPC's core does where too many wait, or with another code, and answers the others."""

    def __init__(self, failing: int, code: grpc.StatusCode = grpc.StatusCode.CANCELLED, after: int = 0) -> None:
        self.failing, self.code, self.after = failing, code, after
        self.called = threading.Semaphore(0)
        self.calls = 0

    def service(self, details: Any) -> Any:
        return grpc.unary_stream_rpc_method_handler(self._answer) if details.method.startswith(SERVICE) else None

    def _answer(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        self.calls += 1
        self.called.release()
        answers = [b""] if request == b"" else [TOKEN, FINISHED]
        if self.calls <= self.failing:
            yield from answers[: self.after]
            context.abort(self.code, "")
        yield from answers


@contextmanager
def serving(handler: Failing) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4), handlers=[handler])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    # Where there are several servers, gRPC asks none whose health it does not know.
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    server.start()
    try:
        yield address
    finally:
        server.stop(0).wait()


def ask(address: str) -> list[str]:
    with SpectrumClient(address) as client:
        return [token.text for token in client.send(REQUEST, WAIT_SECONDS)]


def ask_async(address: str) -> list[str]:
    async def asked() -> list[str]:
        async with AsyncSpectrumClient(address) as client:
            return [token.text async for token in client.send(REQUEST, WAIT_SECONDS)]

    return asyncio.run(asked())


def server_info(address: str) -> None:
    with SpectrumClient(address) as client:
        client.server_info()


def server_info_async(address: str) -> None:
    async def asked() -> None:
        async with AsyncSpectrumClient(address) as client:
            await client.server_info()

    asyncio.run(asked())


@pytest.mark.parametrize("asked", [ask, ask_async])
def test_a_dropped_request_is_sent_again(asked: Any) -> None:
    handler = Failing(2)
    with serving(handler) as address:
        assert asked(address) == ["yes"]
    assert handler.calls == 3


@pytest.mark.parametrize("asked", [server_info, server_info_async])
def test_a_dropped_question_is_asked_again(asked: Any) -> None:
    handler = Failing(2)
    with serving(handler) as address:
        asked(address)
    assert handler.calls == 3


@pytest.mark.parametrize("asked", [ask, ask_async])
def test_a_request_that_is_dropped_again_and_again_is_unavailable(asked: Any) -> None:
    handler = Failing(ATTEMPTS)
    with serving(handler) as address, pytest.raises(UnavailableError, match="too many calls wait"):
        asked(address)
    assert handler.calls == ATTEMPTS


@pytest.mark.parametrize("asked", [ask, ask_async])
def test_a_request_whose_answer_has_begun_is_not_sent_again(asked: Any) -> None:
    handler = Failing(1, after=1)
    with serving(handler) as address, pytest.raises(UnavailableError):
        asked(address)
    assert handler.calls == 1


@pytest.mark.parametrize("asked", [ask, ask_async])
@pytest.mark.parametrize("several", [False, True], ids=["one server", "two servers"])
def test_only_among_several_servers_an_unavailable_one_is_not_the_last(asked: Any, several: bool) -> None:
    handler = Failing(1, grpc.StatusCode.UNAVAILABLE)
    with serving(handler) as address:
        if several:
            assert asked(f"{address},{address}") == ["yes"]
        else:
            with pytest.raises(UnavailableError):
                asked(address)
    assert handler.calls == 1 + several


def test_a_cancelled_request_is_not_sent_again() -> None:
    handler = Failing(ATTEMPTS)
    with serving(handler) as address, SpectrumClient(address) as client:
        stream = client.send(REQUEST, WAIT_SECONDS)
        assert handler.called.acquire(timeout=WAIT_SECONDS)
        stream.cancel()
        with pytest.raises((CancelledError, UnavailableError)):
            stream.result()
    assert handler.calls == 1


def test_no_attempt_begins_after_the_deadline() -> None:
    handler = Failing(ATTEMPTS)
    with serving(handler) as address, SpectrumClient(address) as client:
        began = time.monotonic()
        with pytest.raises(SpectrumKVError, match=r"0\.3 s|too many calls wait"):
            client.send(REQUEST, 0.3).result()
        assert time.monotonic() - began < WAIT_SECONDS
    # The second pause alone is longer than the deadline, however short it is by chance.
    assert handler.calls <= 2


@pytest.mark.slow
def test_no_call_hangs_where_its_server_stops() -> None:
    """With gRPC's retries on, about 3 of 100 servers that stopped left one behind."""
    for _ in range(100):
        handler = Failing(0)
        over = threading.Event()

        def keep_asking(client: SpectrumClient, over: threading.Event = over) -> None:
            while not over.is_set():
                with contextlib.suppress(SpectrumKVError):
                    client.send(REQUEST, 2.0).result()

        with ThreadPoolExecutor(4) as threads:
            with serving(handler) as address:
                client = SpectrumClient(address)
                asking = [threads.submit(keep_asking, client) for _ in range(4)]
                for _ in range(40):
                    assert handler.called.acquire(timeout=WAIT_SECONDS)
            # The server has stopped among the calls.
            over.set()
            for one in asking:
                one.result(WAIT_SECONDS)
            client.close()


def test_no_channel_makes_calls_again_by_itself() -> None:
    """Such calls hang now and then where a server stops, under grpcio 1.85.3."""
    handler = Failing(1)
    with serving(handler) as address, open_channel(address) as channel:
        call = channel.unary_stream(SERVICE + "Generate")(b"", timeout=WAIT_SECONDS)
        with pytest.raises(grpc.RpcError):
            list(call)
    assert handler.calls == 1
