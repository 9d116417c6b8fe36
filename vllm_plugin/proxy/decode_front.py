"""vLLM's API in front of a decode service, as far as the proxy asks it of a server that decodes.

The proxy serves it on loopback for itself. A decode service computes no prompts: what needs KV and did not get any is
refused, and so is a request whose first token is not prefill's.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import grpc
from aiohttp import web

from spectrumkv.common.errors import FailedPreconditionError, InvalidArgumentError, SpectrumKVError
from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.rpc.decode_methods import decode_info_method
from spectrumkv.common.rpc.readiness import is_serving
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.common.service.options import Address
from spectrumkv.v1 import decode_pb2, generation_pb2
from spectrumkv.vllm_plugin.proxy.answers import END, event
from spectrumkv.vllm_plugin.proxy.backends import FINAL
from spectrumkv.vllm_plugin.proxy.bodies import Body
from spectrumkv.vllm_plugin.proxy.bridge import BridgedDecode, HandedOut

# Seconds that a request may take, and that a question about health may; answers under way at once.
LONGEST_SECONDS, HEALTH_SECONDS, ANSWERS = 3600.0, 2.0, 256
# What a request may ask for, and the value that asks for nothing, where only that is served.
_SAMPLING = ("temperature", "top_p", "min_p", "repetition_penalty", "seed", "ignore_eos", "min_tokens")
_SAID_ELSEWHERE = (
    "model", "prompt", "max_tokens", "stream", "stream_options", "kv_transfer_params", "user", "request_id",
    "cache_salt", "priority", "return_token_ids", "add_special_tokens",
)  # fmt: skip
_ONLY: dict[str, Any] = {"n": 1, "skip_special_tokens": True, "logprobs": None, "echo": False}
_KNOWN = frozenset((*_SAMPLING, *_SAID_ELSEWHERE, *_ONLY, "top_k", "stop_token_ids", "logit_bias"))
_REASONS = {generation_pb2.FINISH_REASON_STOP: "stop", generation_pb2.FINISH_REASON_LENGTH: "length"}
_STATUSES = {"INVALID_ARGUMENT": 400, "FAILED_PRECONDITION": 400, "NOT_FOUND": 404, "RESOURCE_EXHAUSTED": 429}


@dataclass(frozen=True)
class Asked:
    """What the proxy asks: to go on from the last token of a prompt, whose KV a vLLM server hands out.

    Attributes:
        handed_out: the prompt.
        producer: address of the vLLM server's connector.
        streams: whether tokens are wanted as they come.
        wants_usage: whether a stream is to end with its usage.
        model: as the client called it.
    """

    handed_out: HandedOut
    producer: str
    streams: bool
    wants_usage: bool
    model: str

    @classmethod
    def of(cls, body: Body) -> "Asked":
        """Read a request.

        Args:
            body: its JSON.

        Returns:
            What it asks.

        Raises:
            InvalidArgumentError: a decode service cannot serve it; the message names the field.
            FailedPreconditionError: it brings no KV.
        """
        transfer = body.get("kv_transfer_params")
        if not transfer:
            raise FailedPreconditionError("the KV did not reach the decode service, which computes no prompts")
        if transfer.get("remote_ranks") != 1:
            raise FailedPreconditionError(
                f"prefill has {transfer.get('remote_ranks')} ranks; a decode service takes KV from one, so serve "
                "prefill without tensor parallelism"
            )
        prompt = body.get("prompt")
        if not isinstance(prompt, list) or len(prompt) != transfer.get("remote_num_tokens", 0) + 1:
            raise InvalidArgumentError(
                "this request's first token is not prefill's, and a decode service goes on from prefill's; ask "
                "without several completions, stop, penalties, structured output and tools"
            )
        handed_out = HandedOut(
            transfer["transfer_id"], f"spectrumkv-{uuid4()}", prompt[:-1], prompt[-1], _sampling(body)
        )
        usage = bool((body.get("stream_options") or {}).get("include_usage"))
        producer = f"{transfer['remote_host']}:{transfer['remote_port']}"
        return cls(handed_out, producer, bool(body.get("stream")), usage, str(body.get("model", "")))

    def chunk(self, tokens: int, choices: list[Body]) -> Body:
        """Return an answer, or a part of one."""
        prompt = len(self.handed_out.prompt_token_ids) + 1
        usage = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
        made = {"id": self.handed_out.request_id, "object": "text_completion", "created": int(time.time())}
        return (
            made | {"model": self.model, "choices": choices} | ({} if choices and self.streams else {"usage": usage})
        )


class DecodeFront:
    """Serves the proxy.

    Args:
        address: "host:port" of the decode service.
        security: of the channels to it, and to the connectors of vLLM servers.
    """

    def __init__(self, address: str, security: ChannelSecurity) -> None:
        self._security = security
        self._decode = open_channel(address, security)
        self._producers: dict[str, grpc.Channel] = {}
        self._listener = Address("127.0.0.1", 0).listener()
        self._pool = ThreadPoolExecutor(ANSWERS, thread_name_prefix="decode-front")

    @property
    def url(self) -> str:
        """Return where the proxy reaches it."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    async def running(self, app: web.Application) -> AsyncIterator[None]:
        """Serve as long as the proxy's application runs."""
        mine = web.Application(client_max_size=app._client_max_size)
        mine.add_routes(
            [
                web.post("/v1/completions", self._complete),
                web.post("/v1/chat/completions", self._complete),
                web.get("/v1/models", self._models),
                web.get("/health", self._health),
            ]
        )
        runner = web.AppRunner(mine, handler_cancellation=True)
        await runner.setup()
        await web.SockSite(runner, self._listener).start()
        yield
        await runner.cleanup()
        for channel in (self._decode, *self._producers.values()):
            channel.close()
        self._pool.shutdown(wait=False)

    async def _complete(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        if (body.get("kv_transfer_params") or {}).get("prefetch"):
            # A Decode stream begins with the prompt, which is not known to the proxy before prefill answers.
            return web.json_response({})
        try:
            asked = Asked.of(body)
            tokens = self._tokens(asked)
            try:
                # Until the first token is there, an error is a status.
                first = await anext(tokens, None)
                if asked.streams:
                    return await self._stream(http, asked, first, tokens)
                found = [] if first is None else [first, *[one async for one in tokens]]
                text = "".join(one.text for one in found)
                reason = _REASONS.get(found[-1].finish_reason) if found else "length"
                choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
                return web.json_response(asked.chunk(len(found), [choice]))
            finally:
                await tokens.aclose()
        except SpectrumKVError as error:
            status = _STATUSES.get(error.code, 503)
            said = {"error": {"message": error.message, "code": status}}
            return web.json_response(said, status=status, headers={FINAL: "1"})

    async def _stream(
        self,
        http: web.Request,
        asked: Asked,
        first: generation_pb2.Token | None,
        rest: AsyncIterator[generation_pb2.Token],
    ) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(http)
        number = 0
        try:
            token = first
            while token is not None:
                number += 1
                choice = {"index": 0, "text": token.text, "finish_reason": _REASONS.get(token.finish_reason)}
                await stream.write(event(asked.chunk(number, [choice])) + b"\n")
                token = await anext(rest, None)
        except SpectrumKVError as error:
            await stream.write(event({"error": {"message": error.message, "code": 503}}) + b"\n")
            return stream
        if asked.wants_usage:
            await stream.write(event(asked.chunk(number, [])) + b"\n")
        await stream.write(END)
        return stream

    async def _tokens(self, asked: Asked) -> AsyncGenerator[generation_pb2.Token, None]:
        """Generate on a thread; leaving the iteration ends the calls.

        Yields:
            The tokens after the first one.

        Raises:
            SpectrumKVError: see `BridgedDecode.tokens`.
        """
        producer = self._producer(asked.producer)
        decode = BridgedDecode(asked.handed_out, producer, self._decode, LONGEST_SECONDS)
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[generation_pb2.Token | SpectrumKVError | None] = asyncio.Queue()

        def generate() -> None:
            end: SpectrumKVError | None = None
            try:
                for token in decode.tokens():
                    loop.call_soon_threadsafe(arrived.put_nowait, token)
            except SpectrumKVError as error:
                end = error
            loop.call_soon_threadsafe(arrived.put_nowait, end)

        generating = loop.run_in_executor(self._pool, generate)
        try:
            while (one := await arrived.get()) is not None:
                if isinstance(one, SpectrumKVError):
                    raise one
                yield one
        finally:
            decode.cancel()
            await generating

    def _producer(self, address: str) -> grpc.Channel:
        if address not in self._producers:
            self._producers[address] = open_channel(address, self._security)
        return self._producers[address]

    async def _models(self, http: web.Request) -> web.Response:
        asked = decode_pb2.DecodeServiceGetServerInfoRequest()
        try:
            info = await asyncio.to_thread(decode_info_method(self._decode), asked, timeout=HEALTH_SECONDS)
        except grpc.RpcError:
            return web.Response(status=503)
        model = {"id": info.model_name, "object": "model", "owned_by": "spectrumkv"}
        return web.json_response({"object": "list", "data": [model]})

    async def _health(self, http: web.Request) -> web.Response:
        try:
            is_well = await asyncio.to_thread(is_serving, self._decode, HEALTH_SECONDS)
        except SpectrumKVError:
            is_well = False
        return web.Response(status=200 if is_well else 503)


def _sampling(body: Mapping[str, Any]) -> SamplingParams:
    """Return how the tokens after the first one are chosen.

    Raises:
        InvalidArgumentError: a field is not served, or its value is not allowed.
    """
    for name, value in body.items():
        if name in _ONLY and value not in (None, _ONLY[name]):
            raise InvalidArgumentError(f"{name} is {value!r}; a decode service allows {_ONLY[name]!r}")
        if name not in _KNOWN and value not in (None, False, 0, "", [], {}):
            raise InvalidArgumentError(f"{name} is {value!r}; a decode service does not take {name}; leave it out")
    given: dict[str, Any] = {name: body[name] for name in _SAMPLING if body.get(name) is not None}
    # vLLM's own defaults, and its word for all tokens.
    given["temperature"] = given.get("temperature", 1.0)
    given["top_k"] = max(0, body.get("top_k") or 0)
    given["stop_token_ids"] = frozenset(body.get("stop_token_ids") or ())
    given["logit_bias"] = {int(token): bias for token, bias in (body.get("logit_bias") or {}).items()}
    # The first token counts.
    return SamplingParams(max_tokens=body["max_tokens"] + 1, **given)
