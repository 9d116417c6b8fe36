"""Keeps a process whose files are used up from spinning over connections that it cannot take.

A listening socket with a caller in its queue stays ready as long as nobody takes the caller, so that a loop around
`select` and `accept` never waits. asyncio's own answer, to try again after a second, begins as many tries as the
queue is long, each with an error in the log, and each of these begins as many (Python 3.11).
"""

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

logger = logging.getLogger(__name__)

Accepted = tuple[socket.socket, Any]

# The process has no descriptor left, or the machine has no file.
_USED_UP = (errno.EMFILE, errno.ENFILE)
# Least time between two lines of the log.
TELL_SECONDS = 60.0
# How long a try waits where the spare descriptor went to somebody else.
PAUSE_SECONDS = 0.05


class SpareFile:
    """Holds a descriptor back, so that a caller for whom none is left is told so: the connection is closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._told_at = -TELL_SECONDS
        self._hold()

    def accept(self, accept: Callable[[], Accepted]) -> Accepted:
        """Take the next connection of a listening socket.

        Args:
            accept: the socket's own method.

        Returns:
            The connection, and its peer's address.

        Raises:
            BlockingIOError: no file is left, and the caller was turned away.
            OSError: as `accept` raises it.
        """
        try:
            return accept()
        except OSError as error:
            if error.errno not in _USED_UP:
                raise
        self._turn_away(accept)
        raise BlockingIOError(errno.EAGAIN, "no file is left for a connection")

    def close(self) -> None:
        """Give the descriptor back."""
        with self._lock:
            self._release()

    def _turn_away(self, accept: Callable[[], Accepted]) -> None:
        with self._lock:
            self._tell()
            self._release()
            try:
                connection, _ = accept()
                connection.close()
            except BlockingIOError:
                # The caller has gone.
                pass
            except OSError:
                time.sleep(PAUSE_SECONDS)
            self._hold()

    def _hold(self) -> None:
        with suppress(OSError):
            self._descriptor = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told_at >= TELL_SECONDS:
            self._told_at = now
            logger.warning(
                "no file is left for new connections, which are closed; let this process open more files (ulimit -n)"
            )


class SparedListener(socket.socket):
    """A listening socket that turns callers away when no file is left for them.

    Args:
        listener: the socket in whose place it comes; it is detached.
    """

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(fileno=listener.detach())
        self._spare = SpareFile()

    def accept(self) -> Accepted:
        """Take the next connection; see `SpareFile.accept`.

        Returns:
            The connection, and its peer's address.
        """
        return self._spare.accept(super().accept)

    def close(self) -> None:
        """Close the socket."""
        self._spare.close()
        super().close()
