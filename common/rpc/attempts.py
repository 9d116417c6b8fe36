"""Calls that are made again, where one ended before any of its answer came.

gRPC has retries of its own. They are switched off: under grpcio 1.85.3, as since 1.72, a call hangs now and then for
ever, its deadline past, where its server stops while gRPC may make it again
([grpc/grpc issue 41036](https://github.com/grpc/grpc/issues/41036), ADR 198).
"""

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

import grpc

from spectrumkv.common.rpc.status import was_dropped

# A call is made so often in all. The pauses between them are longer than those before gRPC tries a connection again.
ATTEMPTS = 5
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 1.0

T = TypeVar("T")
# Makes a call that may take so many seconds; None is no limit.
Begin = Callable[[float | None], T]


def pauses() -> Iterator[float]:
    """Yield the seconds before each further attempt, varied by a fifth, so that callers do not come back together."""
    for attempt in range(ATTEMPTS - 1):
        yield min(FIRST_PAUSE_SECONDS * 2**attempt, LONGEST_PAUSE_SECONDS) * random.uniform(0.8, 1.2)  # noqa: S311  # no secret


class _Attempts:
    """Says whether a call is made again, and how long it may take then.

    Args:
        seconds: until the deadline of all attempts together; None is none.
        several_servers: whether the channel chooses among servers, so that another one may take what one refuses.
    """

    def __init__(self, seconds: float | None, several_servers: bool) -> None:
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._several_servers = several_servers
        self._pauses = pauses()

    @property
    def seconds_left(self) -> float | None:
        """How long the next attempt may take; None is no limit."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def pause_after(self, error: grpc.RpcError) -> float | None:
        """Return the seconds to wait before the next attempt; None where the error is the call's last word.

        It is, too, where the deadline comes before the next attempt: a call without time may still reach a server.

        Args:
            error: what ended an attempt before any of its answer came.
        """
        elsewhere = self._several_servers and error.code() is grpc.StatusCode.UNAVAILABLE
        pause = next(self._pauses, None) if elsewhere or was_dropped(error) else None
        left = self.seconds_left
        return None if pause is None or (left is not None and left <= pause) else pause


def repeated(begin: Begin[T], seconds: float | None, several_servers: bool) -> T:
    """Return what a call of one answer returns, making it again where it may be.

    Args:
        begin: makes the call, and returns its answer.
        seconds: until the deadline of all attempts together; None is none.
        several_servers: whether the channel chooses among servers.

    Raises:
        grpc.RpcError: of the last attempt.
    """
    attempts = _Attempts(seconds, several_servers)
    while True:
        try:
            return begin(attempts.seconds_left)
        except grpc.RpcError as error:
            pause = attempts.pause_after(error)
            if pause is None:
                raise
        time.sleep(pause)


async def repeated_async(begin: Begin[Awaitable[T]], seconds: float | None, several_servers: bool) -> T:
    """Return what `repeated` does, on an event loop.

    Args:
        begin: makes the call.
        seconds: until the deadline of all attempts together; None is none.
        several_servers: whether the channel chooses among servers.

    Raises:
        grpc.RpcError: of the last attempt.
    """
    attempts = _Attempts(seconds, several_servers)
    while True:
        try:
            return await begin(attempts.seconds_left)
        except grpc.RpcError as error:
            pause = attempts.pause_after(error)
            if pause is None:
                raise
        await asyncio.sleep(pause)


class RepeatedStream:
    """Iterates over the answers of a call that is made again where it ends before the first of them.

    Args:
        begin: makes the call; what it raises itself ends the iteration.
        seconds: until the deadline of all attempts together; None is none.
        several_servers: whether the channel chooses among servers.
    """

    def __init__(self, begin: Begin[Any], seconds: float | None, several_servers: bool) -> None:
        self._begin = begin
        self._attempts = _Attempts(seconds, several_servers)
        self._cancelled = threading.Event()
        self._answered = False
        self._call = begin(seconds)

    def __iter__(self) -> "RepeatedStream":
        return self

    def __next__(self) -> Any:
        """Return the next answer, after waiting for it.

        Raises:
            grpc.RpcError: the call ended with an error, and is not made again.
        """
        while True:
            try:
                response = next(self._call)
            except grpc.RpcError as error:
                pause = None if self._answered else self._attempts.pause_after(error)
                if pause is None or self._cancelled.wait(pause):
                    raise
            else:
                self._answered = True
                return response
            self._call = self._begin(self._attempts.seconds_left)
            if self._cancelled.is_set():
                # Whoever cancelled may have reached the call before only.
                self._call.cancel()

    def cancel(self) -> None:
        """End the call; one that has ended is left as it is."""
        self._cancelled.set()
        self._call.cancel()


class RepeatedAsyncStream:
    """The same on an event loop.

    Args:
        begin: makes the call.
        seconds: until the deadline of all attempts together; None is none.
        several_servers: whether the channel chooses among servers.
    """

    def __init__(self, begin: Begin[Any], seconds: float | None, several_servers: bool) -> None:
        self._begin = begin
        self._attempts = _Attempts(seconds, several_servers)
        self._cancelled = False
        self._call = begin(seconds)

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Yield each answer when it arrives.

        Raises:
            grpc.RpcError: the call ended with an error, and is not made again.
        """
        answered = False
        while True:
            try:
                async for response in self._call:
                    answered = True
                    yield response
                return
            except grpc.RpcError as error:
                pause = None if answered else self._attempts.pause_after(error)
                if pause is None:
                    raise
                await asyncio.sleep(pause)
                if self._cancelled:
                    raise
            self._call = self._begin(self._attempts.seconds_left)

    def cancel(self) -> None:
        """End the call; one that has ended is left as it is."""
        self._cancelled = True
        self._call.cancel()
