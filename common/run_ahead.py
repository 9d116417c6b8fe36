"""Stages of a stream that work at the same time: one makes items on a thread of its own, the next one takes them."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from spectrumkv.common.errors import InternalError

T = TypeVar("T")


class RunAhead(Generic[T]):
    """Iterates another iterator on a thread of its own, a few items ahead of whoever iterates this one.

    What the other raises is raised here, after the items before it.

    Args:
        items: what is iterated.
        depth: how many items may wait; then the thread does, so that a slow taker holds up the maker.
        name: of the thread.
    """

    def __init__(self, items: Iterator[T], depth: int, name: str) -> None:
        self._depth = depth
        self._changed = threading.Condition()
        self._waiting: deque[T] = deque()
        self._end: Callable[[], None] | None = None
        self._closed = False
        threading.Thread(target=self._run, args=(items,), name=name, daemon=True).start()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._end is not None or self._closed)
                if self._closed:
                    return
                if not self._waiting:
                    break
                item = self._waiting.popleft()
                self._changed.notify_all()
            yield item
        assert self._end is not None
        self._end()

    def close(self) -> None:
        """Drop what waits, and end both: this at once, the thread at its next item."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def _run(self, items: Iterator[T]) -> None:
        end = _raiser(InternalError("the thread that makes items ended"))
        try:
            for item in items:
                if not self._put(item):
                    return
            end = _nothing
        except Exception as error:  # noqa: BLE001  # it belongs to whoever takes the items
            end = _raiser(error)
        finally:
            # Whatever it was: nobody must wait for a thread that is no more.
            self._finish(end)

    def _put(self, item: T) -> bool:
        """Wait for room; return whether anybody still takes items."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < self._depth or self._closed)
            if not self._closed:
                self._waiting.append(item)
                self._changed.notify_all()
            return not self._closed

    def _finish(self, end: Callable[[], None]) -> None:
        with self._changed:
            self._end = end
            self._changed.notify_all()


def _nothing() -> None:
    """The end of what ends in order."""


def _raiser(error: Exception) -> Callable[[], None]:
    def end() -> None:
        raise error

    return end
