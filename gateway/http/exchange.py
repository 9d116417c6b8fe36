"""Carry out one HTTP request: know its caller, give it a place, read its body in time, and end it where nobody waits.

All this comes before the routes, so that a route sees whole bodies of allowed size from callers that may ask.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from spectrumkv.common.errors import ResourceExhaustedError, SpectrumKVError, UnavailableError
from spectrumkv.gateway.api.errors import CLIENT_CLOSED_REQUEST, HttpError
from spectrumkv.gateway.caller import REQUEST_ID, Caller, Credentials
from spectrumkv.gateway.http.bodies import Bodies, CallerGoneError
from spectrumkv.gateway.http.events import DONE, EVENT_STREAM, event
from spectrumkv.gateway.http.heads import Heads
from spectrumkv.gateway.metrics import GatewayMetrics

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Load balancers, Prometheus and browsers that look at the page have no token.
OPEN_PATHS = frozenset({"/", "/health", "/metrics", "/openapi.json"})
# Below this are the files of the page.
OPEN_FOLDER = "/page/"
# Asked for again and again, by those and by the page: no news for the log.
POLLED_PATHS = OPEN_PATHS | {"/workers"}
RETRY_AFTER_SECONDS = 1.0
# How long a request that is cut off waits for its caller to take the last event.
LAST_WORDS_SECONDS = 1.0
# Of the bodies of all requests that are here. Prompts of a context of 128K tokens take some 512 KiB each.
MAX_HELD_BYTES = 512 << 20
# Of a body to a path that takes none.
OPEN_BODY_BYTES = 1024


@dataclass
class _Progress:
    """Record what a request came to, for its log line.

    Attributes:
        started: when it came, by the monotonic clock.
        status: of the answer; 499 until one is sent.
        has_begun: whether a part of the answer was sent.
        is_stream: whether the answer is server-sent events.
        is_complete: whether all of the answer was sent.
        caller: who sent it; None where that could not be told.
    """

    started: float = field(default_factory=time.monotonic)
    status: int = CLIENT_CLOSED_REQUEST
    has_begun: bool = False
    is_stream: bool = False
    is_complete: bool = False
    caller: Caller | None = None


class Exchange:
    """Wrap the routes.

    Args:
        app: the routes.
        credentials: know callers.
        metrics: count requests.
        heads: check what comes before a body.
        max_requests: how many may be here at once.
        max_body: bytes of a body.
    """

    def __init__(
        self,
        app: App,
        credentials: Credentials,
        metrics: GatewayMetrics,
        heads: Heads,
        max_requests: int,
        max_body: int,
    ) -> None:
        self._app = app
        self._credentials = credentials
        self._metrics = metrics
        self._heads = heads
        self._max_requests = max_requests
        self._max_body = max_body
        self._bodies = Bodies()
        self._running = 0
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or one event of the server's life."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        progress = _Progress()
        try:
            await self._serve(scope, receive, _noting(send, progress), progress)
        except CallerGoneError:
            progress.status = CLIENT_CLOSED_REQUEST
        except asyncio.CancelledError:
            # The server stops, and the grace is over or a second signal came.
            await _end(send, progress)
        except Exception:
            progress.status = 500
            logger.exception("a route failed")
        finally:
            self._write(scope, progress)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, progress: _Progress) -> None:
        is_open = scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_FOLDER) or scope["method"] == "OPTIONS"
        counted = not is_open
        try:
            self._heads.check(scope)
            progress.caller = self._credentials.identify(scope["headers"], is_open)
            if counted:
                self._check_room()
            body = await self._bodies.read(receive, OPEN_BODY_BYTES if is_open else self._max_body)
            if counted:
                # A body that comes slowly has no place; others may have taken the last one meanwhile.
                self._check_room(len(body))
            self._running += counted
            self._held += len(body)
            try:
                self._metrics.running.set(self._running)
                scope.setdefault("state", {})["caller"] = progress.caller
                await self._answer(scope, body, receive, send, progress)
            finally:
                self._running -= counted
                self._held -= len(body)
                self._metrics.running.set(self._running)
        except SpectrumKVError as error:
            await send_error(HttpError.of(error), send)
        except HttpError as error:
            await send_error(error, send)

    def _check_room(self, size: int = 0) -> None:
        """Refuse a request where there are as many as are allowed, or where their bodies fill the memory for them.

        Args:
            size: bytes of the request's own body, once it is known.

        Raises:
            ResourceExhaustedError: there are too many, or too many bytes of them.
        """
        if size and self._held + size > MAX_HELD_BYTES:
            raise ResourceExhaustedError(
                f"this body has {size} bytes, and those of the requests in this server have {self._held} of at most "
                f"{MAX_HELD_BYTES}; try again later",
                RETRY_AFTER_SECONDS,
            )
        if self._running >= self._max_requests:
            raise ResourceExhaustedError(
                f"{self._running} requests are in this server, as many as --max-requests allows; try again later",
                RETRY_AFTER_SECONDS,
            )

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send, progress: _Progress) -> None:
        """Run the route, and cancel it where the caller goes away.

        Raises:
            CallerGoneError: the caller went away.
            asyncio.CancelledError: the server stops.
        """
        unread = [body]

        async def replay() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            # Nothing else comes: the watch below notices the caller's end, and cancels the route.
            never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
            return await never

        serving = asyncio.ensure_future(self._app(scope, replay, send))
        watching = asyncio.ensure_future(_wait_for_disconnect(receive))
        try:
            await asyncio.wait((serving, watching), return_when=asyncio.FIRST_COMPLETED)
            # uvicorn says "disconnect" after the end of an answer, too.
            if not serving.done() and not progress.is_complete:
                serving.cancel()
                await asyncio.wait((serving,))
                raise CallerGoneError
            await serving
        except asyncio.CancelledError:
            serving.cancel()
            # Nothing else is sent from here on.
            await asyncio.wait((serving,))
            raise
        finally:
            watching.cancel()
            serving.cancel()

    def _write(self, scope: Scope, progress: _Progress) -> None:
        """Count a request and log its line; those that look whether the gateway lives are no news."""
        route = getattr(scope.get("route"), "path", None) or "other"
        self._metrics.requests.labels(route, str(progress.status)).inc()
        caller = progress.caller
        fields: dict[str, Any] = {
            "service": "Gateway",
            "method": scope["method"],
            "route": route,
            "status": progress.status,
            "seconds": time.monotonic() - progress.started,
            "peer": ":".join(map(str, scope.get("client") or ())),
        }
        if caller is not None:
            fields |= {"request_id": caller.request_id, "caller": caller.name}
            fields |= {"trace_id": caller.trace.trace_id} if caller.trace.trace_id else {}
        level = logging.DEBUG if scope["path"] in POLLED_PATHS else logging.INFO
        logger.log(level, "request ended", extra={"fields": fields})


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _noting(send: Send, progress: _Progress) -> Send:
    """Return a `send` that notes the answer's status, and tells the caller the request's id."""

    async def noted(message: Message) -> None:
        if message["type"] == "http.response.start":
            progress.status, progress.has_begun = message["status"], True
            kinds = [value for name, value in message.get("headers", ()) if name == b"content-type"]
            progress.is_stream = any(kind.startswith(EVENT_STREAM) for kind in kinds)
            if progress.caller is not None:
                name = (REQUEST_ID.encode(), progress.caller.request_id.encode("latin-1"))
                message["headers"] = [*message.get("headers", ()), name]
        progress.is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        await send(message)

    return noted


async def _end(send: Send, progress: _Progress) -> None:
    """Tell the caller of a request that is cut off by the server's end, unless it reads nothing."""
    error = HttpError.of(UnavailableError("this gateway is stopping; ask again in a moment", RETRY_AFTER_SECONDS))
    noted = _noting(send, progress)
    with suppress(TimeoutError):
        async with asyncio.timeout(LAST_WORDS_SECONDS):
            if not progress.has_begun:
                await send_error(error, noted)
            elif progress.is_stream and not progress.is_complete:
                await noted({"type": "http.response.body", "body": event(error.body) + DONE})


async def send_error(error: HttpError, send: Send) -> None:
    """Send an error as the whole answer."""
    body = json.dumps(error.body, ensure_ascii=False).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    pairs = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
