"""Read the bodies of requests, and bound what those that are still on their way hold together.

A body that comes slowly takes no place among the requests. Where too many are on their way, or too much of them, the
one that began first is ended: an honest body follows its headers at once, so that it is never that one.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from spectrumkv.common.service.machine import max_connections
from spectrumkv.gateway.api.errors import HttpError

# How long a body may take to come, whole.
BODY_SECONDS = 30.0
# How many bodies may be on their way, and the bytes of them that are kept meanwhile.
MAX_ARRIVING = 256
MAX_ARRIVING_BYTES = 256 << 20
# How many times the allowed length of a body is read before the connection is closed.
READ_OF_TOO_MUCH = 4
# Of errors after which the rest of the body is not read.
_CLOSE = {"Connection": "close"}

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class CallerGoneError(Exception):
    """The caller closed its connection before it had the answer."""


@dataclass(eq=False)
class _Arriving:
    """A body on its way.

    Attributes:
        clock: ends it.
        size: bytes of it that are kept.
        makes_room: whether it is ended for others.
    """

    clock: asyncio.Timeout
    size: int = 0
    makes_room: bool = False

    def late(self, size: int) -> HttpError:
        """Return what the caller is told whose body did not come in time, of which `size` bytes had come."""
        if self.makes_room:
            said = (
                f"too many bodies are on their way, and this one began first ({size} bytes had come); send it faster"
            )
            return HttpError(503, said, "service_unavailable_error", headers={**_CLOSE, "Retry-After": "1"})
        said = f"the body did not come within {BODY_SECONDS:g} s ({size} bytes had come); send it faster"
        return HttpError(408, said, headers=_CLOSE)


class Bodies:
    """Read the bodies of one gateway's requests."""

    def __init__(self) -> None:
        # In the order in which they began.
        self._arriving: dict[_Arriving, None] = {}
        self._kept = 0

    async def read(self, receive: Receive, most: int) -> bytes:
        """Return a request's body.

        Args:
            receive: of the request.
            most: bytes that the body may have.

        Raises:
            HttpError: it is too long, does not come in time, or is ended for others.
            CallerGoneError: the caller went away.
        """
        data = bytearray()
        size, more = 0, True
        clock = asyncio.timeout(BODY_SECONDS)
        arriving = _Arriving(clock)
        try:
            async with clock:
                self._arriving[arriving] = None
                self._make_room()
                # A caller that is still sending reads no answer: some of what is too much is read, and forgotten.
                while more and size <= READ_OF_TOO_MUCH * most:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise CallerGoneError
                    part, more = message.get("body", b""), message.get("more_body", False)
                    size += len(part)
                    if size <= most:
                        data += part
                        self._keep(arriving, len(part))
        except TimeoutError:
            raise arriving.late(size) from None
        finally:
            self._forget(arriving)
        if size > most:
            said = f"the body is longer than {most} bytes, the most that is taken; send less"
            raise HttpError(413, said, headers=_CLOSE)
        return bytes(data)

    def _keep(self, arriving: _Arriving, size: int) -> None:
        if not arriving.makes_room:
            arriving.size += size
            self._kept += size
            self._make_room()

    def _make_room(self) -> None:
        """End bodies, those that began first, until the others are within the limits."""
        while len(self._arriving) > most_arriving() or self._kept > MAX_ARRIVING_BYTES:
            first = next(iter(self._arriving))
            self._forget(first)
            first.makes_room = True
            first.clock.reschedule(asyncio.get_running_loop().time())

    def _forget(self, arriving: _Arriving) -> None:
        if arriving in self._arriving:
            del self._arriving[arriving]
            self._kept -= arriving.size


def most_arriving() -> int:
    """Return how many bodies may be on their way: connections are left for others."""
    return min(MAX_ARRIVING, max(1, max_connections() // 2))
