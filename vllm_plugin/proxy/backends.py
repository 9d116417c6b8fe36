"""Which servers there are, which of them answer, and which one takes the next request."""

import asyncio
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import aiohttp

from spectrumkv.common.errors import UnavailableError

# How often servers are asked whether they are well, and how long they may take.
ASK_SECONDS, ANSWER_SECONDS = 2.0, 2.0


@dataclass
class Backend:
    """One vLLM server.

    Attributes:
        url: "http://host:port".
        healthy: whether it answered last time.
        running: requests that it serves for this proxy.
    """

    url: str
    healthy: bool = True
    running: int = 0


class BackendGroup:
    """Servers that do the same.

    Args:
        role: "prefill" or "decode".
        urls: of the servers.
    """

    def __init__(self, role: str, urls: tuple[str, ...]) -> None:
        self.role = role
        self.backends = [Backend(url.rstrip("/")) for url in urls]

    @contextmanager
    def chosen(self, tried: Collection[str] = ()) -> Iterator[Backend]:
        """Choose the healthy server with the fewest requests.

        Args:
            tried: URLs of those that failed this request.

        Yields:
            The server, which counts the request as its own until the block ends.

        Raises:
            UnavailableError: there is none.
        """
        left = [one for one in self.backends if one.healthy and one.url not in tried]
        if not left:
            asked = ", ".join(one.url for one in self.backends)
            raise UnavailableError(f"no {self.role} server answers; asked: {asked}")
        backend = min(left, key=lambda one: one.running)
        backend.running += 1
        try:
            yield backend
        finally:
            backend.running -= 1

    @property
    def healthy(self) -> int:
        """Return how many servers answer."""
        return sum(one.healthy for one in self.backends)

    async def watch(self, session: aiohttp.ClientSession) -> None:
        """Ask the servers for ever.

        Args:
            session: to ask with.
        """
        while True:
            await asyncio.gather(*(self._ask(session, one) for one in self.backends))
            await asyncio.sleep(ASK_SECONDS)

    async def _ask(self, session: aiohttp.ClientSession, backend: Backend) -> None:
        try:
            timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
            async with session.get(f"{backend.url}/health", timeout=timeout) as answer:
                backend.healthy = answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            backend.healthy = False
