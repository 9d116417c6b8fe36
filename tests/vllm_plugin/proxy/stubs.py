"""Stand-ins for vLLM servers that answer as vLLM does, and a proxy over them."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from spectrumkv.common.security import ChannelSecurity
from spectrumkv.vllm_plugin.proxy.app import Proxy
from spectrumkv.vllm_plugin.proxy.decode_front import DecodeFront

TRANSFER = {"do_remote_prefill": True, "transfer_id": "t"}
ADDRESS = {"remote_host": "p.example", "remote_port": 14600, "remote_ranks": 1}
PATIENCE = 20.0


@dataclass
class Stub:
    """A vLLM server that answers with fixed tokens.

    Attributes:
        fails: how many of the next requests it refuses with 500.
        hangs: whether it streams its first token and then nothing.
        floods: whether its stream has tokens without end.
        breaks: whether its stream breaks off after its first token.
        reports: how many of its next streams begin with an error, as those do whose KV did not come.
        keeps: whether it answers more than one request on a connection; otherwise it closes it as the next one comes.
        asked: bodies of its requests.
        callers: addresses of the connections that they came on.
        connections: of its requests under way.
        left: set when a client leaves while it hangs or floods.
        transfer: what it answers as prefill.
        prompt: whose KV it handed out.
        first: its first token.
        holds: set it, and prefill answers; None answers at once.
        announced: set when a transfer is announced.
        dropped: set when that is taken back.
    """

    fails: int = 0
    hangs: bool = False
    floods: bool = False
    breaks: bool = False
    reports: int = 0
    keeps: bool = True
    asked: list[dict[str, Any]] = field(default_factory=list)
    callers: set[Any] = field(default_factory=set)
    connections: list[Any] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    transfer: dict[str, Any] = field(default_factory=lambda: TRANSFER)
    prompt: list[int] = field(default_factory=lambda: [1, 2])
    first: int = 7
    holds: asyncio.Event | None = None
    announced: asyncio.Event = field(default_factory=asyncio.Event)
    dropped: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([
            web.post("/v1/completions", self.complete),
            web.get("/v1/models", self.models),
            web.get("/health", self.health),
        ])  # fmt: skip
        return app

    async def health(self, http: web.Request) -> web.Response:
        return web.Response()

    async def models(self, http: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m", "max_model_len": 100}]})

    async def complete(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        assert http.transport is not None
        caller = http.transport.get_extra_info("peername")
        if not self.keeps and caller in self.callers:
            http.transport.close()
            raise ConnectionResetError
        self.callers.add(caller)
        self.connections.append(http.transport)
        self.asked.append(body)
        if self.fails:
            self.fails -= 1
            return web.json_response({"error": {"message": "broken"}}, status=500)
        if body.get("model") == "unknown":
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        answer = {"id": "x", "created": 1, "model": "m", "object": "text_completion"}
        match (body.get("kv_transfer_params") or {}).get("prefetch"):
            case "begin":
                self.announced.set()
            case "drop":
                self.dropped.set()
        if (body.get("kv_transfer_params") or {}).get("do_remote_decode"):
            choice = {
                "index": 0,
                "text": " one",
                "token_ids": [self.first],
                "prompt_token_ids": self.prompt,
                "finish_reason": "length",
            }
            if self.holds is not None:
                await self.holds.wait()
            return web.json_response(answer | {"choices": [choice], "kv_transfer_params": self.transfer})
        if not body.get("stream"):
            usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
            choice = {"index": 0, "text": " two three", "finish_reason": "length"}
            return web.json_response(answer | {"choices": [choice], "usage": usage})
        return await self.stream(http, answer)

    async def stream(self, http: web.Request, answer: dict[str, Any]) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(http)
        if self.reports:
            self.reports -= 1
            await stream.write(b'data: {"error": {"message": "no KV", "code": 500}}\n\n')
            return stream
        texts = itertools.repeat(" more") if self.floods else (" two", " three")
        for text in texts:
            chunk = answer | {"choices": [{"index": 0, "text": text, "finish_reason": None}]}
            try:
                await stream.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
            except (ConnectionResetError, asyncio.CancelledError):
                self.left.set()
                raise
            if self.breaks and http.transport is not None:
                http.transport.close()
                return stream
            if self.hangs:
                try:
                    await asyncio.sleep(PATIENCE)
                finally:
                    self.left.set()
        await stream.write(b"data: [DONE]\n\n")
        return stream


@asynccontextmanager
async def listening(app: web.Application, cancels: bool = True) -> AsyncIterator[str]:
    runner = web.AppRunner(app, handler_cancellation=cancels)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


Check = Callable[["aiohttp.ClientSession", str], Coroutine[Any, Any, None]]


def serve(
    prefill: list[Stub], decode: list[Stub], check: Check, cancels: bool = True, services: Sequence[str] = ()
) -> None:
    """Run a proxy over stand-ins, and a check against it.

    Without `cancels` it learns from writing who left. `services` are decode services, instead of stand-ins.
    """

    async def main() -> None:
        async with AsyncExitStack() as stack:
            for one in (*prefill, *decode):
                one.url = await stack.enter_async_context(listening(one.app()))
            fronts = [DecodeFront(address, ChannelSecurity()) for address in services]
            proxy = Proxy(
                tuple(one.url for one in prefill), tuple(one.url for one in (*decode, *fronts)), None, fronts
            )
            url = await stack.enter_async_context(listening(proxy.app(), cancels))
            session = await stack.enter_async_context(aiohttp.ClientSession())
            await asyncio.wait_for(check(session, url), PATIENCE)

    asyncio.run(main())


async def post(session: Any, url: str, **body: Any) -> tuple[int, Any]:
    asked = {"model": "m", "prompt": "Count:", "max_tokens": 3} | body
    async with session.post(f"{url}/v1/completions", json=asked) as answer:
        return answer.status, await answer.json()
