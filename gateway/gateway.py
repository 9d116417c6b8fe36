"""Hold what the routes share: the client of the prefill services, the texts of tokens, metrics and options."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from spectrumkv.client.async_client import AsyncSpectrumClient
from spectrumkv.client.request import Request
from spectrumkv.common.errors import quoted
from spectrumkv.common.tool_calls import FORMATS, ToolCallFormat
from spectrumkv.gateway.answers.delivery import deliver_events, deliver_whole
from spectrumkv.gateway.answers.token_texts import TokenTexts
from spectrumkv.gateway.answers.writer import AnswerWriter
from spectrumkv.gateway.api.errors import HttpError
from spectrumkv.gateway.api.sampling import SamplingFields
from spectrumkv.gateway.caller import Caller
from spectrumkv.gateway.config import GatewayConfig
from spectrumkv.gateway.metrics import GatewayMetrics


@dataclass(frozen=True)
class Gateway:
    """Serve requests by way of prefill services; it lives on one event loop.

    Attributes:
        config: the options.
        metrics: of the process.
        client: of the prefill services, each request of which goes to one of them.
        prefills: a client of each prefill service by its address, to ask each of them what it does.
        texts: of single tokens.
    """

    config: GatewayConfig
    metrics: GatewayMetrics
    client: AsyncSpectrumClient
    prefills: Mapping[str, AsyncSpectrumClient]
    texts: TokenTexts

    @classmethod
    def connected(cls, config: GatewayConfig, metrics: GatewayMetrics) -> "Gateway":
        """Return a gateway whose client connects at its first call.

        Raises:
            InvalidArgumentError: the options do not allow to connect.
        """
        client, *each = (
            AsyncSpectrumClient(target, config.security(), own_token=config.checks_tokens)
            for target in (config.target, *map(str, config.prefill))
        )
        return cls(config, metrics, client, {one.address: one for one in each}, TokenTexts(client))

    async def close(self) -> None:
        """Close the connections to prefill."""
        for one in (self.client, *self.prefills.values()):
            await one.close()

    async def served_model(self, named: str | None, caller: Caller) -> str:
        """Return the model that an answer says it is of: the one that the request names, else the served one.

        Raises:
            SpectrumKVError: prefill cannot be reached, or refuses.
        """
        if named:
            return named
        return (await self.client.server_info(authorization=caller.authorization)).model_name

    async def tool_call_format(self, caller: Caller) -> ToolCallFormat:
        """Return how the served model writes tool calls.

        Raises:
            HttpError: it writes none, or in a way that this gateway does not read.
            SpectrumKVError: prefill cannot be reached, or refuses.
        """
        name = (await self.client.server_info(authorization=caller.authorization)).tool_call_format
        if not name:
            raise HttpError(
                400,
                "tools are given and the model has no chat template; send a prompt to /v1/completions",
                param="tools",
            )
        if name not in FORMATS:
            raise HttpError(
                400,
                f"tools are given and the model writes calls in the form {quoted(name)}; the gateway reads "
                f"{', '.join(FORMATS)}",
                param="tools",
            )
        return FORMATS[name]

    async def answer(
        self, fields: SamplingFields, requests: Sequence[Request], writer: AnswerWriter, caller: Caller
    ) -> Response:
        """Return the response to a request, after sending it to prefill.

        Args:
            fields: what the caller asked for.
            requests: one for each prompt.
            writer: of the route.
            caller: for whom prefill is asked.

        Raises:
            SpectrumKVError: an answer ended with an error before its first token, or a whole one at any time.
        """
        arrived = asyncio.get_running_loop().time()
        streams = [
            self.client.send(one, self.config.deadline, caller.trace, caller.authorization) for one in requests
        ]
        if not fields.stream:
            return await deliver_whole(streams, writer)
        response = await deliver_events(streams, writer, fields.includes_usage)
        self.metrics.time_to_first_token.observe(asyncio.get_running_loop().time() - arrived)
        return response


def gateway_of(request: HttpRequest) -> Gateway:
    """Return the gateway that serves an HTTP request."""
    gateway: Gateway = request.app.state.gateway
    return gateway


def caller_of(request: HttpRequest) -> Caller:
    """Return who sent an HTTP request."""
    caller: Caller = request.state.caller
    return caller
