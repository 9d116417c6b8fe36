"""Which servers there are, which of them answer, which one takes the next request, and how they fail."""

import asyncio
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from spectrumkv.common.errors import UnavailableError

# How often servers are asked whether they are well, and how long they may take.
ASK_SECONDS, ANSWER_SECONDS = 2.0, 2.0
# A server is well until it has kept so many questions waiting, one after another: a busy one may miss one or two, and
# where it is the only one, all requests of its role would end.
MOST_UNANSWERED = 3


# A server's header that says: no other server, and no request without KV, will do better.
FINAL = "X-SpectrumKV-Final"


class BackendError(Exception):
    """A server refused a request or failed at it: the client gets its status and its words.

    Args:
        status: of HTTP.
        words: the body of the answer, JSON.
        is_final: whether no other server may begin anew: the client has some of the tokens, or the server says so.
    """

    def __init__(self, status: int, words: bytes, is_final: bool = False) -> None:
        super().__init__(f"status {status}")
        self.status, self.words, self.is_final = status, words, is_final

    @classmethod
    def of(cls, error: Exception, is_final: bool = False) -> "BackendError":
        """Return the error as one of a server: what is none is a server that cannot be reached or understood."""
        if isinstance(error, BackendError):
            return error
        said = {"error": {"message": f"{type(error).__name__}: {error}", "code": 502}}
        return cls(502, json.dumps(said).encode(), is_final)

    @property
    def may_be_tried_elsewhere(self) -> bool:
        """Return whether another server may do better."""
        return self.status >= 500 and not self.is_final

    @property
    def outcome(self) -> str:
        """Return the value of the metric's label."""
        return f"status_{self.status}"

    @property
    def event(self) -> dict[str, Any]:
        """Return the event that ends a stream."""
        try:
            said = json.loads(self.words)
        except ValueError:
            said = None
        if isinstance(said, dict) and "error" in said:
            return said
        return {"error": {"message": f"decode answered with status {self.status}", "code": self.status}}


@dataclass
class Backend:
    """One vLLM server.

    Attributes:
        url: "http://host:port".
        healthy: whether it answers, as far as is known.
        unanswered: questions that it has kept waiting since its last answer.
        running: requests that it serves for this proxy.
    """

    url: str
    healthy: bool = True
    unanswered: int = 0
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
    def chosen(self, tried: Collection[str] = (), preferred: Backend | None = None) -> Iterator[Backend]:
        """Choose the healthy server with the fewest requests.

        Args:
            tried: URLs of those that failed this request.
            preferred: taken if it is healthy.

        Yields:
            The server, which counts the request as its own until the block ends.

        Raises:
            UnavailableError: there is none.
        """
        left = [one for one in self.backends if one.healthy and one.url not in tried]
        if not left:
            asked = ", ".join(one.url for one in self.backends)
            raise UnavailableError(f"no {self.role} server answers; asked: {asked}")
        backend = min(left, key=lambda one: (one is not preferred, one.running))
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
            await self.ask(session)
            await asyncio.sleep(ASK_SECONDS)

    async def ask(self, session: aiohttp.ClientSession) -> None:
        """Ask each server once whether it is well.

        Args:
            session: to ask with.
        """
        await asyncio.gather(*(self._ask(session, one) for one in self.backends))

    async def _ask(self, session: aiohttp.ClientSession, backend: Backend) -> None:
        try:
            timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
            async with session.get(f"{backend.url}/health", timeout=timeout) as answer:
                backend.healthy, backend.unanswered = answer.status == 200, 0
        except TimeoutError:
            backend.unanswered += 1
            backend.healthy = backend.healthy and backend.unanswered < MOST_UNANSWERED
        except aiohttp.ClientError:
            backend.healthy = False
