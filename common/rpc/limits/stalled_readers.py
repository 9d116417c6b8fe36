"""Callers that take no message while one waits for them: how long they may hold what their request holds.

A handler that has answered more than a connection's windows take waits until its caller reads. Without a limit, a
caller that never reads would keep its place, and its slots on decode, until its deadline.
"""

import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc

from spectrumkv.common.errors import CancelledError
from spectrumkv.common.rpc.status import end_call

STALL_SECONDS = 60.0
# How often readers are looked at, relative to the time that they have.
_LOOKS = 10


class Reader:
    """The caller of one stream.

    Args:
        context: the stream's.

    Attributes:
        error: says that the stream was ended because its caller took no message; None where it was not.
    """

    def __init__(self, context: grpc.ServicerContext) -> None:
        self.error: CancelledError | None = None
        self._context = context
        # When the message that waits was handed to gRPC; None while none waits. Written by the handler's thread
        # without a lock, since each token passes here.
        self._since: float | None = None

    def taking(self, messages: Iterator[Any]) -> Iterator[Any]:
        """Yield messages, and note for how long each waits for the caller.

        Args:
            messages: the answers of a handler.

        Yields:
            The same.

        Raises:
            CancelledError: the stream was ended because its caller took no message.
        """
        try:
            for message in messages:
                self._since = time.monotonic()
                yield message
                self._since = None
                if self.error is not None:
                    # gRPC may ask for the next message before it tells that the stream has ended.
                    raise self.error
        finally:
            self._since = None
            if hasattr(messages, "close"):
                messages.close()

    def end_if_stalled(self, seconds: float) -> None:
        """End the stream where a message has waited for longer than `seconds`."""
        since = self._since
        if since is not None and self.error is None and time.monotonic() - since > seconds:
            self.error = CancelledError(f"the caller took no message for {seconds:g} s")
            end_call(self._context, self.error)


class StalledReaders:
    """Ends streams whose callers take no message for too long; one thread looks after all of them.

    Args:
        seconds: how long a message may wait for its caller.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._changed = threading.Condition()
        self._readers: set[Reader] = set()
        self._watcher: threading.Thread | None = None

    def enter(self, context: grpc.ServicerContext) -> Reader:
        """Look after a stream until `leave`.

        Args:
            context: the stream's.

        Returns:
            Its reader.
        """
        reader = Reader(context)
        with self._changed:
            self._readers.add(reader)
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="stalled-readers", daemon=True)
                self._watcher.start()
        return reader

    def leave(self, reader: Reader) -> None:
        """Look after a stream no longer."""
        with self._changed:
            self._readers.remove(reader)
            if not self._readers:
                self._changed.notify()

    def _watch(self) -> None:
        """Look at the readers again and again; the thread ends when there is none."""
        with self._changed:
            while self._readers:
                self._changed.wait(self._seconds / _LOOKS)
                for reader in self._readers:
                    reader.end_if_stalled(self._seconds)
            self._watcher = None
