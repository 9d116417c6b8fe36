"""Says whether a service's model still works: the pulses of the threads that compute, and its breakdown."""

import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

logger = logging.getLogger(__name__)


class Vitals:
    """Keeps the pulses of the threads that compute, and takes in once that the model works no more.

    The engine's thread has a pulse while it runs the model, and a request's thread while it codes or decodes KV. The
    watchdog and the process's main thread read along.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._beats = itertools.count()
        self._pulses: dict[int, int] = {}
        self._failure: str | None = None
        self._on_failure: list[Callable[[], object]] = []

    @property
    def failure(self) -> str | None:
        """Why the model works no more; None while it works."""
        return self._failure

    @property
    def pulses(self) -> Mapping[int, int]:
        """The threads that work, each with a number that changes as it makes progress."""
        with self._lock:
            return dict(self._pulses)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Give the calling thread a pulse while the block runs."""
        self.beat()
        try:
            yield
        finally:
            with self._lock:
                del self._pulses[threading.get_ident()]

    def beat(self) -> None:
        """Show progress of the calling thread within a block of `working` that takes long."""
        with self._lock:
            self._pulses[threading.get_ident()] = next(self._beats)

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
