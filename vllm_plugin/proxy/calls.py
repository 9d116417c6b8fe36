"""Calls servers on behalf of a client's request."""

import aiohttp
from aiohttp import web

from spectrumkv.vllm_plugin.proxy.answers import Continuation, EventError
from spectrumkv.vllm_plugin.proxy.backends import FINAL, BackendError
from spectrumkv.vllm_plugin.proxy.bodies import Body
from spectrumkv.vllm_plugin.proxy.client_stream import write


class Calls:
    """Calls servers.

    Args:
        session: to call with.
        api_key: sent to them; None sends the client's own.
    """

    def __init__(self, session: aiohttp.ClientSession, api_key: str | None) -> None:
        self.session, self._api_key = session, api_key
        self._models: dict[str, int] = {}

    async def post(self, http: web.Request, url: str, body: Body) -> Body:
        """Send a request that is answered as a whole.

        Args:
            http: the client's request.
            url: of the server, with the path.
            body: what is asked.

        Returns:
            The answer's JSON.

        Raises:
            BackendError: the server refused the request.
            aiohttp.ClientError: it could not be reached.
        """
        body = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
        async with self.session.post(url, json=body, headers=self.headers(http)) as answer:
            if answer.status != 200:
                raise BackendError(answer.status, await answer.read(), FINAL in answer.headers)
            found: Body = await answer.json()
            return found

    async def relay(
        self, http: web.Request, stream: web.StreamResponse, asked: Continuation, url: str, body: Body
    ) -> None:
        """Pass decode's stream on, as that of the request where it goes on from prefill's token.

        Args:
            http: the client's request.
            stream: to the client.
            asked: how decode goes on.
            url: of the server, with the path.
            body: what is asked.

        Raises:
            BackendError: decode refused the request, or its stream broke off.
        """
        relayed = False
        try:
            async with self.session.post(url, json=body, headers=self.headers(http)) as answer:
                if answer.status != 200:
                    raise BackendError(answer.status, await answer.read(), FINAL in answer.headers)
                async for line in answer.content:
                    await write(stream, asked.line(line))
                    relayed = True
        except EventError as error:
            failure = BackendError(502, error.words, is_final=relayed)
            raise failure from error
        except aiohttp.ClientError as error:
            failure = BackendError.of(error, is_final=relayed)
            raise failure from error

    async def most_tokens(self, http: web.Request, url: str) -> int:
        """Return the context length of a server's model."""
        if url not in self._models:
            async with self.session.get(f"{url}/v1/models", headers=self.headers(http)) as answer:
                self._models[url] = int((await answer.json())["data"][0]["max_model_len"])
        return self._models[url]

    def headers(self, http: web.Request) -> dict[str, str]:
        """Return what a call carries for a client's request."""
        given = http.headers.get("Authorization")
        key = f"Bearer {self._api_key}" if self._api_key else given
        return {"Authorization": key} if key else {}
