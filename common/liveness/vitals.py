"""Says whether a service still works: the pulses of the threads that compute or must end, and its breakdown."""

import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

logger = logging.getLogger(__name__)

# What makes no progress where a pulse stands still, for the log.
MODEL = "the model"
CALL_THAT_IS_OVER = "the thread of a call that is over"


@dataclass(frozen=True, eq=False)
class Pulse:
    """Belongs to one piece of work.

    Attributes:
        thread: the thread that does it.
        what: how the log calls it.
    """

    thread: int
    what: str


class Vitals:
    """Keeps the pulses of the threads that compute, and takes in once that the service works no more.

    The engine's thread has a pulse while it runs the model, and a request's thread while it tokenizes, codes or
    decodes KV. The thread of a request that is over has one until it has left, whatever it waits for: a lock that
    nobody lets go is found by that. The watchdog and the process's main thread read along.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._beats = itertools.count()
        self._pulses: dict[Pulse, int] = {}
        # The innermost piece of work of each thread.
        self._current = threading.local()
        self._failure: str | None = None
        self._on_failure: list[Callable[[], object]] = []

    @property
    def failure(self) -> str | None:
        """Why the service works no more; None while it works."""
        return self._failure

    @property
    def pulses(self) -> Mapping[Pulse, int]:
        """What is worked on, each with a number that changes as the work makes progress."""
        with self._lock:
            return dict(self._pulses)

    @contextmanager
    def working(self, what: str = MODEL) -> Iterator[None]:
        """Give the calling thread a pulse while the block runs; within another such block, in place of that one's.

        Args:
            what: makes no progress where the pulse stands still, for the log.
        """
        outer: Pulse | None = getattr(self._current, "pulse", None)
        pulse = Pulse(threading.get_ident(), what)
        self._replace(outer, pulse)
        self._current.pulse = pulse
        try:
            yield
        finally:
            self._current.pulse = outer
            self._replace(pulse, outer)

    def beat(self) -> None:
        """Show progress of the calling thread within a block of `working` that takes long."""
        pulse: Pulse | None = getattr(self._current, "pulse", None)
        if pulse is not None:
            self._replace(None, pulse)

    @contextmanager
    def leaving_after(self, on_end: Callable[[Callable[[], object]], object]) -> Iterator[None]:
        """Give the calling thread a pulse that never beats from the end of its call to the end of the block.

        Args:
            on_end: has its argument called, from whichever thread, once the call is over.
        """
        pulse = Pulse(threading.get_ident(), CALL_THAT_IS_OVER)
        left = threading.Event()

        def call_is_over() -> None:
            self._replace(None, pulse)
            # Also where the thread left meanwhile, or long before, as it does where all went well.
            if left.is_set():
                self._replace(pulse, None)

        on_end(call_is_over)
        try:
            yield
        finally:
            left.set()
            self._replace(pulse, None)

    def _replace(self, old: Pulse | None, new: Pulse | None) -> None:
        with self._lock:
            if old is not None:
                self._pulses.pop(old, None)
            if new is not None:
                self._pulses[new] = next(self._beats)

    def fail(self, reason: str) -> None:
        """Take in that the service works no more, log it, and call those who must know; only the first call counts.

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
        """Call `callback` once the service works no more, from whichever thread finds out: at once if it is so."""
        with self._lock:
            if self._failure is None:
                self._on_failure.append(callback)
                return
        callback()
