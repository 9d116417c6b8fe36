"""How a decode server hears of KV that prefill still computes, so that it is received meanwhile."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web

from spectrumkv.vllm_plugin.proxy.backends import Backend, BackendError, BackendGroup
from spectrumkv.vllm_plugin.proxy.bodies import Body, ClientRequest
from spectrumkv.vllm_plugin.proxy.calls import Calls
from spectrumkv.vllm_plugin.proxy.metrics import ProxyMetrics

# Where a producer hands KV out; it says so in each of its answers, and from the second request on it is known before.
ADDRESS = ("remote_host", "remote_port", "remote_ranks")


@dataclass
class Announcement:
    """KV that a decode server receives ahead of its request.

    Attributes:
        server: receives it.
        is_taken: whether the request has been sent there.
    """

    server: Backend
    is_taken: bool = False

    def taken_by_request(self) -> Backend:
        """Return where the request goes; from now on the server knows by itself when the KV is not needed."""
        self.is_taken = True
        return self.server


class Announcements:
    """Announces transfers to decode servers by small requests (see `decode.prefetch`).

    Args:
        decode: the servers.
        metrics: count what could not be announced.
    """

    def __init__(self, decode: BackendGroup, metrics: ProxyMetrics) -> None:
        self._decode, self._metrics = decode, metrics
        self._addresses: dict[str, Body] = {}
        self._sending: set[asyncio.Task[None]] = set()

    def learn(self, prefill_url: str, transfer: Mapping[str, Any] | None) -> None:
        """Take in where a prefill server hands KV out.

        Args:
            prefill_url: of the server.
            transfer: `kv_transfer_params` of its answer; those of other connectors are left alone.
        """
        if transfer and all(name in transfer for name in ADDRESS):
            self._addresses[prefill_url] = {name: transfer[name] for name in ADDRESS}

    @asynccontextmanager
    async def announced(
        self, calls: Calls, http: web.Request, request: ClientRequest, prefill: Backend, transfer_id: str
    ) -> AsyncIterator[Announcement | None]:
        """Have a decode server receive a transfer, and drop it if no request was sent there when the block ends.

        Args:
            calls: calls it.
            http: the client's request.
            request: what it asks.
            prefill: computes the prompt.
            transfer_id: names the transfer.

        Yields:
            The announcement; None where the address of prefill's connector is not known yet, or not exactly one
            request will take the KV.

        Raises:
            UnavailableError: there is no decode server.
        """  # the group raises it
        address = self._addresses.get(prefill.url)
        if address is None or request.completions > 1 or request.max_tokens == 1:
            yield None
            return
        params = {"do_remote_prefill": True, "transfer_id": transfer_id} | address
        with self._decode.chosen() as server:
            announcement = Announcement(server)
            beginning = self._send(calls, http, request, server, params | {"prefetch": "begin"})
            try:
                yield announcement
            finally:
                if not announcement.is_taken:
                    self._send(calls, http, request, server, params | {"prefetch": "drop"}, beginning)

    def _send(
        self,
        calls: Calls,
        http: web.Request,
        request: ClientRequest,
        server: Backend,
        params: Body,
        before: asyncio.Task[None] | None = None,
    ) -> asyncio.Task[None]:
        """Send a request of one token.

        Returns:
            The task that sends it, once `before` has ended.
        """

        async def send() -> None:
            if before is not None:
                await before
            model = {"model": request.body["model"]} if "model" in request.body else {}
            body = model | {"prompt": [1], "max_tokens": 1, "temperature": 0, "kv_transfer_params": params}
            try:
                await calls.post(http, f"{server.url}/v1/completions", body)
            except (BackendError, aiohttp.ClientError):
                # The request that follows fetches the KV for itself, and what nobody takes is dropped in time.
                self._metrics.announcements_failed.inc()

        task = asyncio.create_task(send())
        # asyncio itself keeps no task alive.
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)
        return task
