"""The client for asyncio does what the one for threads does; the tests of answers are those of `test_client`."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from spectrumkv.client.async_client import AsyncSpectrumClient
from spectrumkv.client.request import Request
from spectrumkv.common import errors
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.common.security.tokens import TOKEN_VARIABLE
from spectrumkv.common.telemetry.tracing import TraceContext
from tests.client.fake_servers import finished, token

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def ask(prefill: Any, use: Callable[[AsyncSpectrumClient], Coroutine[Any, Any, Any]], **named: Any) -> Any:
    """Return what `use` gives for a client of the fake service."""

    async def connected() -> Any:
        async with AsyncSpectrumClient(prefill.address, **named) as client:
            return await use(client)

    return asyncio.run(connected())


def test_tokens_arrive_one_by_one_then_the_completion(prefill: Any) -> None:
    first_was_seen = threading.Event()

    def answer(request: Any, context: Any) -> Any:
        yield token(0, "a")
        assert first_was_seen.wait(10)
        yield token(1, "b")
        yield finished(2)

    prefill.answer = answer

    async def read(client: AsyncSpectrumClient) -> Any:
        texts = []
        async with client.send(Request(prompt="x", request_id="mine")) as stream:
            async for event in stream:
                texts.append(event.text)
                first_was_seen.set()
        return texts, stream.received.completion()

    texts, completion = ask(prefill, read)
    assert texts == ["a", "b"]
    assert (completion.text, completion.finish_reason) == ("ab", "stop")
    assert prefill.requests[0].request_id == "mine"


def test_an_error_arrives_as_it_was_with_its_delay(prefill: Any) -> None:
    def answer(request: Any, context: Any) -> Any:
        yield token(0, "a")
        raise errors.ResourceExhaustedError("no slots", retry_after_seconds=2.25)

    prefill.answer = answer

    async def read(client: AsyncSpectrumClient) -> None:
        with pytest.raises(errors.ResourceExhaustedError, match="no slots") as caught:
            await client.send(Request(prompt="x")).result()
        assert caught.value.retry_after_seconds == 2.25

    ask(prefill, read)


def test_a_stream_without_a_result_is_no_answer(prefill: Any) -> None:
    prefill.answer = lambda request, context: iter([token(0, "a")])

    async def read(client: AsyncSpectrumClient) -> None:
        with pytest.raises(errors.InternalError, match="after 1 tokens without a result"):
            await client.send(Request(prompt="x")).result()

    ask(prefill, read)


@pytest.mark.parametrize("leave", ["block", "task"])
def test_leaving_ends_the_request_at_the_server(prefill: Any, leave: str) -> None:
    def answer(request: Any, context: Any) -> Any:
        yield token(0, "a")
        prefill.ended.wait(30)

    prefill.answer = answer

    async def read(client: AsyncSpectrumClient) -> None:
        started = asyncio.Event()

        async def first() -> None:
            async with client.send(Request(prompt="x")) as stream:
                async for _ in stream:
                    started.set()
                    if leave == "block":
                        break

        task = asyncio.ensure_future(first())
        await started.wait()
        if leave == "task":
            task.cancel()
        await asyncio.wait([task])
        assert await asyncio.to_thread(prefill.ended.wait, 10)

    ask(prefill, read)


def test_the_deadline_is_named(prefill: Any) -> None:
    prefill.answer = lambda request, context: iter([token(0, "a")] if prefill.ended.wait(30) else [])

    async def read(client: AsyncSpectrumClient) -> None:
        with pytest.raises(errors.DeadlineExceededError, match=r"within 0\.3 s"):
            await client.send(Request(prompt="x"), timeout=0.3).result()

    ask(prefill, read)


def test_calls_bring_trace_and_token(prefill: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    def answer(request: Any, context: Any) -> Any:
        seen.append(dict(context.invocation_metadata()))
        yield finished(0)

    prefill.answer = answer
    monkeypatch.setenv(TOKEN_VARIABLE, "own-token-of-the-client")

    async def send(client: AsyncSpectrumClient) -> None:
        await client.send(Request(prompt="x"), trace=TraceContext(TRACEPARENT)).result()
        await client.send(Request(prompt="x"), authorization="Bearer of-the-caller").result()

    ask(prefill, send)
    assert [one.get("authorization") for one in seen] == ["Bearer own-token-of-the-client", "Bearer of-the-caller"]
    assert [one.get("traceparent") for one in seen] == [TRACEPARENT, None]
    seen.clear()
    ask(prefill, send, own_token=False)
    assert [one.get("authorization") for one in seen] == [None, "Bearer of-the-caller"]


def test_info_and_health(prefill: Any) -> None:
    async def read(client: AsyncSpectrumClient) -> Any:
        return await client.is_serving(), await client.server_info()

    serving, info = ask(prefill, read)
    assert serving
    assert info.model_name == "tiny-llama"


def test_plaintext_stays_on_this_machine() -> None:
    async def connect() -> None:
        with pytest.raises(errors.InvalidArgumentError, match="would not be encrypted"):
            AsyncSpectrumClient("10.0.0.1:50051")
        async with AsyncSpectrumClient("10.0.0.1:50051", ChannelSecurity(allow_plaintext=True)):
            pass

    asyncio.run(connect())
