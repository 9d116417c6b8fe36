"""Send requests to prefill and deliver their answers, whole or as server-sent events."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from spectrumkv.client.async_client import AsyncCompletionStream
from spectrumkv.client.completion import PromptToken, TokenEvent
from spectrumkv.common.errors import InternalError, SpectrumKVError
from spectrumkv.gateway.answers.writer import AnswerWriter, Token
from spectrumkv.gateway.api.errors import HttpError
from spectrumkv.gateway.http.events import DONE, EVENT_STREAM, event

logger = logging.getLogger(__name__)


class EventStream(StreamingResponse):
    """Send server-sent events as they come. The exchange around the routes notices a caller that goes away."""

    media_type = EVENT_STREAM.decode()

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
    yield event(first)
    try:
        async for chunk in chunks:
            yield event(chunk)
    except SpectrumKVError as error:
        yield event(HttpError.of(error).body)
    except Exception as error:  # the status is sent already; the caller must learn of any error
        logger.error("a stream failed", exc_info=error)
        yield event(HttpError.of(InternalError(f"{type(error).__name__}; the gateway's log has more")).body)
    yield DONE


async def _chunks(
    streams: Sequence[AsyncCompletionStream], writer: AnswerWriter, with_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    """Yield the objects of a stream: those of each answer in its order, and answers as they come."""
    answers, lengths = writer.options.answers, Counter[int]()
    opening = writer.opening(len(streams) * answers)
    async with AsyncExitStack() as held:
        for one in streams:
            await held.enter_async_context(one)
        async for place, token in _merged(streams):
            choice = place * answers + token.answer
            said = await _said_of(choice, token, streams[place].received.prompt_tokens, writer, lengths)
            # The opening waits for the first token, so that an error before it has a status of its own.
            for chunk in (*opening, *said):
                yield chunk
            opening = []
        if with_usage:
            yield writer.usage_chunk([one.received.completion() for one in streams])


async def _said_of(
    choice: int, token: TokenEvent, prompt: Sequence[PromptToken], writer: AnswerWriter, lengths: Counter[int]
) -> list[dict[str, Any]]:
    """Return the chunks that one token makes.

    Args:
        choice: the choice that the token belongs to.
        token: the token.
        prompt: the prompt's tokens, where the request asked for them.
        writer: of the route.
        lengths: characters of each choice so far; those of this token are added.
    """
    groups: list[Sequence[Token]] = [prompt] if prompt and writer.options.echo and token.index == 0 else []
    said: list[dict[str, Any]] = []
    for tokens in (*groups, [token]):
        said += await writer.chunks(choice, tokens, lengths[choice])
        lengths[choice] += sum(len(one.text) for one in tokens)
    if token.finish_reason is not None:
        said += writer.last_chunks(choice, token.finish_reason)
    return said


async def _merged(streams: Sequence[AsyncCompletionStream]) -> AsyncIterator[tuple[int, TokenEvent]]:
    """Yield the tokens of all streams as they come, each with its stream's place."""
    if len(streams) == 1:
        async for token in streams[0]:
            yield 0, token
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
            if what is None:
                left -= 1
            else:
                yield place, what
    finally:
        for task in tasks:
            task.cancel()
