"""Bound what one HTTP connection may take: the size of its headers, silence, and an answer that nobody reads.

uvicorn itself bounds the headers of a request and the silence after an answer. It waits for ever for the first
request of a connection, for the end of headers, and for a reader that stands still.
"""

import asyncio
import json
import sys
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from spectrumkv.common.service.machine import max_connections
from spectrumkv.gateway.api.errors import HttpError
from spectrumkv.gateway.http.heads import too_long

# A connection may take so long to send the headers of a request, from its first byte or from the connection's start.
HEAD_SECONDS = 10.0
# A connection may be silent for so long after an answer.
IDLE_SECONDS = 75
# A caller may leave sent bytes unread for so long, and has to read so many of them in that time.
STALL_SECONDS = 60.0
LEAST_READ_BYTES = 64 << 10
# Of h11's reason, which may quote all that came.
MAX_REASON_CHARACTERS = 160


class BoundedConnection(H11Protocol):
    """Serve one connection, for as long as it sends whole requests and reads its answers.

    Where there are too many connections, the one that has been idle for the longest is closed; an honest caller's
    request follows its connection at once.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._idle_since = time.monotonic()
        self._head_deadline: asyncio.TimerHandle | None = None
        self._stall_deadline: asyncio.TimerHandle | None = None
        self._unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a new connection, in the place of an idle one where there is no other place."""
        super().connection_made(transport)
        # `pause_writing` is called as soon as the system does not take a byte, so that no rest of an answer, however
        # short, keeps a connection for ever.
        transport.set_write_buffer_limits(high=1)
        self._wait_for_head()
        if len(self.connections) > max_connections():
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request."""
        if self.is_idle and self._head_deadline is None:
            self._wait_for_head()
        super().data_received(data)
        if not self.is_idle:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        self._idle_since = time.monotonic()
        super().on_response_complete()

    @property
    def is_idle(self) -> bool:
        """Whether no request of the connection is being served."""
        return self.cycle is None or self.cycle.response_complete

    def pause_writing(self) -> None:
        """Begin to wait for a caller that does not read."""
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        """Stop to wait: the caller reads again."""
        if self._stall_deadline is not None:
            self._stall_deadline.cancel()
            self._stall_deadline = None
        super().resume_writing()

    def _wait_for_reader(self) -> None:
        self._unread = self.transport.get_write_buffer_size()
        self._stall_deadline = self.loop.call_later(STALL_SECONDS, self._judge_reader)

    def _judge_reader(self) -> None:
        """End the connection of a caller that read nothing, or next to nothing; wait on for a slow one."""
        if self._unread - self.transport.get_write_buffer_size() < LEAST_READ_BYTES:
            self.transport.abort()
        else:
            self._wait_for_reader()

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are no request, in the form of every other error."""
        reason = sys.exception()
        status = reason.error_status_hint if isinstance(reason, h11.RemoteProtocolError) else 400
        said = f"this is no HTTP request that the server can read: {str(reason)[:MAX_REASON_CHARACTERS]}"
        self.refuse(too_long() if status == 431 else HttpError(status, said))

    def refuse(self, error: HttpError) -> None:
        """Answer with an error where no answer has begun, and close the connection."""
        self._stop_waiting()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            body = json.dumps(error.body, ensure_ascii=False).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", f"{len(body)}"),
                *(error.headers | {"Connection": "close"}).items(),
            ]
            for event in (
                h11.Response(status_code=error.status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _wait_for_head(self) -> None:
        self._head_deadline = self.loop.call_later(HEAD_SECONDS, self._refuse_slow_head)

    def _stop_waiting(self) -> None:
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None

    def _refuse_slow_head(self) -> None:
        self.refuse(HttpError(408, f"no whole request came within {HEAD_SECONDS:g} s; send one, or connect later"))

    def _make_room(self) -> None:
        idle = [one for one in self.connections if isinstance(one, BoundedConnection) and one.is_idle]
        oldest = min(idle, key=lambda one: one._idle_since)
        oldest.refuse(
            HttpError(
                503,
                f"{len(self.connections)} connections are open, and this one was idle for the longest; connect again "
                "when there is a request",
                "service_unavailable_error",
                headers={"Retry-After": "1"},
            )
        )
        if oldest.transport.get_write_buffer_size():
            # It does not read what it has asked for, and would keep its file until it does.
            oldest.transport.abort()
        # `connection_lost` comes later, and must not be waited for by the next connection.
        self.connections.discard(oldest)
