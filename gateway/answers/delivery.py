"""Send requests to prefill and deliver their answers, whole or as server-sent events."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from spectrumkv.client.async_client import AsyncCompletionStream
from spectrumkv.client.completion import TokenEvent
from spectrumkv.common.errors import InternalError, SpectrumKVError
from spectrumkv.gateway.answers.writer import AnswerWriter
from spectrumkv.gateway.api.errors import HttpError

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Send server-sent events as they come. The exchange around the routes notices a caller that goes away."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        # Proxies such as nginx would keep events back to send them together.
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events."""
        await self.stream_response(send)


async def deliver_whole(streams: Sequence[AsyncCompletionStream], writer: AnswerWriter) -> Response:
    """Return the whole answer, when it has come.

    Args:
        streams: an answer to each prompt.
        writer: of the route.

    Raises:
        SpectrumKVError: one of the answers ended with an error; the others are cancelled.
    """
    async with AsyncExitStack() as held:
        for one in streams:
            await held.enter_async_context(one)
        completions = await asyncio.gather(*(one.result() for one in streams))
        return JSONResponse(await writer.whole(completions))


async def deliver_events(
    streams: Sequence[AsyncCompletionStream], writer: AnswerWriter, with_usage: bool
) -> Response:
    """Return the answer as events, as soon as the first token is there.

    An error before it becomes the status of the response, a later one the last event but `[DONE]`.

    Args:
        streams: an answer to each prompt.
        writer: of the route.
        with_usage: whether an event with `usage` ends the stream.

    Raises:
        SpectrumKVError: there is no first token.
    """
    chunks = _chunks(streams, writer, with_usage)
    first = await anext(chunks)
    return EventStream(_events(first, chunks))


async def _events(first: dict[str, Any], chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    yield _event(first)
    try:
        async for chunk in chunks:
            yield _event(chunk)
    except SpectrumKVError as error:
        yield _event(HttpError.of(error).body)
    except Exception as error:  # the status is sent already; the caller must learn of any error
        logger.error("a stream failed", exc_info=error)
        yield _event(HttpError.of(InternalError(f"{type(error).__name__}; the gateway's log has more")).body)
    yield DONE


async def _chunks(
    streams: Sequence[AsyncCompletionStream], writer: AnswerWriter, with_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    """Yield the objects of a stream: those of each answer in its order, and answers as they come."""
    lengths = [0] * len(streams)
    opening = writer.opening(len(streams))
    async with AsyncExitStack() as held:
        for one in streams:
            await held.enter_async_context(one)
        async for choice, token in _merged(streams):
            if token is not None:
                chunk = await writer.chunk(choice, token, lengths[choice])
                lengths[choice] += len(token.text)
            else:
                chunk = writer.last_chunk(choice, streams[choice].received.completion().finish_reason)
            # They wait for the first token, so that an error before it has a status of its own.
            for said in opening:
                yield said
            opening = []
            yield chunk
        if with_usage:
            yield writer.usage_chunk([one.received.completion().usage for one in streams])


async def _merged(
    streams: Sequence[AsyncCompletionStream],
) -> AsyncIterator[tuple[int, TokenEvent | None]]:
    """Yield each stream's tokens under its place, and None at its end."""
    if len(streams) == 1:
        async for token in streams[0]:
            yield 0, token
        yield 0, None
        return
    arrived: asyncio.Queue[tuple[int, TokenEvent | Exception | None]] = asyncio.Queue()

    async def follow(place: int, stream: AsyncCompletionStream) -> None:
        try:
            async for token in stream:
                arrived.put_nowait((place, token))
            arrived.put_nowait((place, None))
        except Exception as error:  # noqa: BLE001  # raised where the queue is read
            arrived.put_nowait((place, error))

    tasks = [asyncio.ensure_future(follow(place, one)) for place, one in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            place, what = await arrived.get()
            if isinstance(what, Exception):
                raise what
            left -= what is None
            yield place, what
    finally:
        for task in tasks:
            task.cancel()


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
