"""Peers that take no message while one waits for them: how long they may hold what their request holds.

Whoever has sent more than a connection's windows take waits until its peer reads. Without a limit, a caller that
never reads would keep its place, and its slots on decode, until its deadline; and a decode worker that never reads
would keep memory on prefill for which other workers' requests wait.
"""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from spectrumkv.common.errors import CancelledError

STALL_SECONDS = 60.0
# How often readers are looked at, relative to the time that they have.
_LOOKS = 10


class Reader:
    """The peer that takes the messages of one stream.

    Args:
        end: ends the stream, from any thread, for the reason that it is given.

    Attributes:
        error: says that the stream was ended because its peer took no message; None where it was not.
    """

    def __init__(self, end: Callable[[CancelledError], object]) -> None:
        self.error: CancelledError | None = None
        self._end = end
        # When the message that waits was handed to gRPC; None while none waits. Written by the handler's thread
        # without a lock, since each token passes here.
        self._since: float | None = None

    def taking(self, messages: Iterator[Any]) -> Iterator[Any]:
        """Yield messages, and note for how long each waits for the peer.

        Args:
            messages: what is sent on the stream.

        Yields:
            The same.

        Raises:
            CancelledError: the stream was ended because its peer took no message.
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
            self._end(self.error)


class StalledReaders:
    """Ends streams whose peers take no message for too long; one thread looks after all of them.

    Args:
        seconds: how long a message may wait for its peer.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._changed = threading.Condition()
        self._readers: set[Reader] = set()
        self._watcher: threading.Thread | None = None

    def enter(self, end: Callable[[CancelledError], object]) -> Reader:
        """Look after a stream until `leave`.

        Args:
            end: ends the stream, from any thread, for the reason that it is given.

        Returns:
            Its reader.
        """
        reader = Reader(end)
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
                # Ending a stream may have it leave.
                for reader in tuple(self._readers):
                    reader.end_if_stalled(self._seconds)
            self._watcher = None
