"""Stages of a stream that work at the same time: one makes items on a thread of its own, the next one takes them."""

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from spectrumkv.common.errors import InternalError

T = TypeVar("T")


class PrefetchIterator(Generic[T]):
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
        self._over = False
        self._error: Exception | None = None
        self._closed = False
        threading.Thread(target=self._run, args=(items,), name=name, daemon=True).start()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._over or self._closed)
                if self._closed:
                    return
                if not self._waiting:
                    break
                item = self._waiting.popleft()
                self._changed.notify_all()
            yield item
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Drop what waits, and end both: this at once, the thread at its next item."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def _run(self, items: Iterator[T]) -> None:
        error: Exception | None = InternalError("the thread that makes items ended")
        try:
            for item in items:
                if not self._put(item):
                    return
            error = None
        except Exception as raised:  # noqa: BLE001  # it belongs to whoever takes the items
            error = raised
        finally:
            # Whatever it was: nobody must wait for a thread that is no more.
            self._finish(error)

    def _put(self, item: T) -> bool:
        """Wait for room; return whether anybody still takes items."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < self._depth or self._closed)
            if not self._closed:
                self._waiting.append(item)
                self._changed.notify_all()
            return not self._closed

    def _finish(self, error: Exception | None) -> None:
        with self._changed:
            self._over, self._error = True, error
            self._changed.notify_all()
