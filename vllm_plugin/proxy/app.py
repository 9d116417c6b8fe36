"""The proxy's HTTP side: prefill first, then decode, whose tokens follow prefill's first one."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import TypeVar

import aiohttp
from aiohttp import web
from prometheus_client import generate_latest

from spectrumkv.common.errors import InvalidArgumentError, SpectrumKVError
from spectrumkv.common.service.options import Address
from spectrumkv.common.service.spare_file import SparedListener
from spectrumkv.vllm_plugin.proxy.announcements import Announcement, Announcements
from spectrumkv.vllm_plugin.proxy.answers import END, Continuation, first_chunks, without_internals
from spectrumkv.vllm_plugin.proxy.backends import Backend, BackendError, BackendGroup
from spectrumkv.vllm_plugin.proxy.bodies import Body, ClientRequest, PrefillAnswer
from spectrumkv.vllm_plugin.proxy.calls import Calls
from spectrumkv.vllm_plugin.proxy.client_stream import ClientLeftError, begin_events, send, write
from spectrumkv.vllm_plugin.proxy.decode_front import DecodeFront
from spectrumkv.vllm_plugin.proxy.metrics import ProxyMetrics

# A prompt of a million tokens as text fits.
MOST_BODY_BYTES = 32 << 20
# How a request ended, for the metric; the others are statuses.
OK, CANCELLED = "ok", "cancelled"

Answer = TypeVar("Answer")


class Proxy:
    """Serves completions.

    Args:
        prefill: URLs of the producers.
        decode: URLs of the consumers.
        api_key: sent to them; None sends the client's own.
        fronts: of decode services, which run as long as the proxy; `decode` has their URLs.
    """

    def __init__(
        self,
        prefill: tuple[str, ...],
        decode: tuple[str, ...],
        api_key: str | None = None,
        fronts: Sequence[DecodeFront] = (),
    ) -> None:
        self._prefill, self._decode = BackendGroup("prefill", prefill), BackendGroup("decode", decode)
        self._api_key, self._fronts = api_key, fronts
        self._metrics = ProxyMetrics()
        self._announcements = Announcements(self._decode, self._metrics)

    def app(self) -> web.Application:
        """Return the application for aiohttp."""
        app = web.Application(client_max_size=MOST_BODY_BYTES)
        app.add_routes(
            [
                web.post("/v1/completions", self._completions),
                web.post("/v1/chat/completions", self._completions),
                web.get("/v1/models", self._list_models),
                web.get("/health", self._health),
                web.get("/metrics", self._show_metrics),
            ]
        )
        app.cleanup_ctx.extend(one.running for one in self._fronts)
        app.cleanup_ctx.append(self._run)
        return app

    async def _run(self, app: web.Application) -> AsyncIterator[None]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        # A kept connection may be closed by its server (vLLM does after 5 s) as a request is sent on it, and whether
        # the server took that request cannot be told. A new connection costs little beside a prompt.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            self._calls = Calls(session, self._api_key)
            watching = [asyncio.create_task(group.watch(session)) for group in (self._prefill, self._decode)]
            yield
            for task in watching:
                task.cancel()

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        """Answer one request: prefill computes the prompt and the first token, decode goes on from there.

        Returns:
            The answer, whole or as it was streamed, or what refuses the request.
        """
        started, outcome = asyncio.get_running_loop().time(), CANCELLED
        try:
            request = ClientRequest(await http.json(), http.path.startswith("/v1/chat"))
            async with AsyncExitStack() as prefetching:
                first, announcement = await self._prefilled(http, request, prefetching)
                self._metrics.time_to_first_token.observe(asyncio.get_running_loop().time() - started)
                answer, outcome = await self._answer(http, request, first, announcement)
            return answer
        except ClientLeftError as left:
            return left.stream
        except BackendError as error:
            outcome = error.outcome
            return web.Response(status=error.status, body=error.words, content_type="application/json")
        except json.JSONDecodeError as error:
            outcome = "invalid_argument"
            return _refusal(400, f"the request's body is no JSON: {error}")
        except SpectrumKVError as error:
            outcome = error.code.lower()
            return _refusal(400 if isinstance(error, InvalidArgumentError) else 503, error.message)
        finally:
            self._metrics.requests.labels(outcome).inc()

    async def _prefilled(
        self, http: web.Request, request: ClientRequest, prefetching: AsyncExitStack
    ) -> tuple[PrefillAnswer, Announcement | None]:
        """Have a prefill server compute the prompt, and another one if it fails; decode receives the KV meanwhile.

        Args:
            http: the client's request.
            request: what it asks.
            prefetching: ends once the KV was used, or will not be.

        Returns:
            What prefill answered, and which decode server receives the KV; None where none does yet.

        Raises:
            BackendError: all failed, or one refused the request.
        """
        tried: set[str] = set()
        while True:
            with self._prefill.chosen(tried) as backend:
                tried.add(backend.url)
                try:
                    async with AsyncExitStack() as attempt:
                        transfer_id = f"spectrumkv-{uuid.uuid4()}"
                        announced = self._announcements.announced(self._calls, http, request, backend, transfer_id)
                        announcement = await attempt.enter_async_context(announced)
                        body = request.for_prefill(transfer_id)
                        answer = await self._calls.post(http, f"{backend.url}{request.path}", body)
                        first = PrefillAnswer.of(answer, await self._calls.most_tokens(http, backend.url))
                        self._announcements.learn(backend.url, first.transfer)
                        await prefetching.enter_async_context(attempt.pop_all())
                        return first, announcement
                except (BackendError, aiohttp.ClientError, KeyError, IndexError) as error:
                    failure = BackendError.of(error)
            if not failure.may_be_tried_elsewhere or len(tried) >= self._prefill.healthy:
                raise failure
            self._metrics.retries.labels("prefill").inc()

    async def _answer(
        self, http: web.Request, request: ClientRequest, first: PrefillAnswer, announcement: Announcement | None
    ) -> tuple[web.StreamResponse, str]:
        """Answer with prefill's token and decode's.

        Returns:
            The answer, and how the request ended.
        """
        if first.transfer is None and (first.finish_reason == "stop" or request.max_tokens == 1):
            return await self._only_first(http, request, first), OK
        asked = Continuation.of(request, first)
        if request.streams:
            return await self._stream(http, asked, announcement)
        rest = without_internals(await self._decoded(asked, announcement, partial(self._calls.post, http)))
        return web.json_response(asked.joined(rest)), OK

    async def _stream(
        self, http: web.Request, asked: Continuation, announcement: Announcement | None
    ) -> tuple[web.StreamResponse, str]:
        """Stream the first token and what decode generates; a failure is the last event, since the status is sent.

        Returns:
            The stream, and how the request ended.
        """
        stream, outcome = await begin_events(http), OK
        try:
            for chunk in asked.opening:
                await send(stream, chunk)
            await self._decoded(asked, announcement, partial(self._calls.relay, http, stream, asked))
        except BackendError as error:
            outcome = error.outcome
            await send(stream, error.event)
        except SpectrumKVError as error:
            outcome = error.code.lower()
            await send(stream, {"error": {"message": error.message, "code": 503}})
        return stream, outcome

    async def _decoded(
        self, asked: Continuation, announcement: Announcement | None, ask: Callable[[str, Body], Awaitable[Answer]]
    ) -> Answer:
        """Have a decode server go on; where that fails, have one compute the prompt, as if its KV did not come.

        Args:
            asked: of decode.
            announcement: of the KV; None where it was not announced.
            ask: sends a body to a URL.

        Returns:
            What `ask` returned.

        Raises:
            BackendError: decode refused the request, failed twice, or failed when the client had some of its tokens.
        """
        server = None if announcement is None else announcement.taken_by_request()
        try:
            return await self._decoded_once(asked.path, asked.body, ask, server)
        except BackendError as error:
            if not error.may_be_tried_elsewhere:
                raise
        self._metrics.retries.labels("decode").inc()
        return await self._decoded_once(asked.path, asked.body_without_kv, ask)

    async def _decoded_once(
        self,
        path: str,
        body: Body,
        ask: Callable[[str, Body], Awaitable[Answer]],
        preferred: Backend | None = None,
    ) -> Answer:
        with self._decode.chosen(preferred=preferred) as backend:
            try:
                return await ask(f"{backend.url}{path}", body)
            except aiohttp.ClientError as error:
                failure = BackendError.of(error)
                raise failure from error

    async def _only_first(
        self, http: web.Request, request: ClientRequest, first: PrefillAnswer
    ) -> web.StreamResponse:
        """Answer with prefill's token, which is all that is asked for or ends the text.

        Returns:
            The answer.
        """
        answer = without_internals(first.answer)
        if not request.streams:
            return web.json_response(answer)
        stream = await begin_events(http)
        *before, last = first_chunks(request, first)
        last["choices"][0]["finish_reason"] = first.finish_reason
        for chunk in (*before, last):
            await send(stream, chunk)
        if request.wants_usage:
            await send(stream, last | {"choices": [], "usage": answer.get("usage")})
        await write(stream, END)
        return stream

    async def _list_models(self, http: web.Request) -> web.Response:
        with self._decode.chosen() as backend:
            async with self._calls.session.get(
                f"{backend.url}/v1/models", headers=self._calls.headers(http)
            ) as answer:
                return web.Response(status=answer.status, body=await answer.read(), content_type="application/json")

    async def _health(self, http: web.Request) -> web.Response:
        well = {group.role: group.healthy for group in (self._prefill, self._decode)}
        return web.json_response(well, status=200 if all(well.values()) else 503)

    async def _show_metrics(self, http: web.Request) -> web.Response:
        for group in (self._prefill, self._decode):
            self._metrics.servers_healthy.labels(group.role).set(group.healthy)
        return web.Response(body=generate_latest(self._metrics.registry), content_type="text/plain")


def _refusal(status: int, sentence: str) -> web.Response:
    return web.json_response({"error": {"message": sentence, "code": status}}, status=status)


def serve(proxy: Proxy, host: str, port: int) -> None:
    """Serve until Ctrl-C; a client that goes away ends what was begun for it.

    Args:
        proxy: the proxy.
        host: to listen on.
        port: to listen on.
    """
    with suppress(KeyboardInterrupt):
        listener = SparedListener(Address(host, port).listener())
        web.run_app(proxy.app(), sock=listener, handler_cancellation=True, print=None)
