"""Says whether a service's model still works: the pulse of the thread that runs it, and its breakdown."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


class Vitals:
    """Keeps the pulse of the thread that runs the model, and takes in once that the model works no more.

    The engine beats and fails; the watchdog and the process's main thread read along.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._beats = 0
        self._thread: int | None = None
        self._failure: str | None = None
        self._on_failure: list[Callable[[], object]] = []

    @property
    def failure(self) -> str | None:
        """Why the model works no more; None while it works."""
        return self._failure

    @property
    def pulse(self) -> tuple[int, int] | None:
        """The thread that works, and a number that rises as it makes progress; None where there is nothing to do."""
        thread = self._thread
        return None if thread is None else (thread, self._beats)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Have a pulse while the block runs; one thread at a time."""
        self._beats += 1
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None

    def beat(self) -> None:
        """Show progress within a block of `working` that takes long."""
        self._beats += 1

    def fail(self, reason: str) -> None:
        """Take in that the model works no more, log it, and call those who must know; only the first call counts.

        Args:
            reason: what happened, for the log.
        """
        with self._lock:
            if self._failure is not None:
                return
            self._failure = reason
            callbacks, self._on_failure = self._on_failure, []
        logger.critical("this process cannot go on and ends: %s", reason)
        for callback in callbacks:
            callback()

    def on_failure(self, callback: Callable[[], object]) -> None:
        """Call `callback` once the model works no more, from whichever thread finds that out: at once if it is so."""
        with self._lock:
            if self._failure is None:
                self._on_failure.append(callback)
                return
        callback()
