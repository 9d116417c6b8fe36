"""Lets two stages of a stream work at the same time: a thread makes items ahead of the stage that takes them."""

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from spectrumkv.common.errors import InternalError

T = TypeVar("T")


class PrefetchIterator(Generic[T]):
    """Iterates over an iterator that runs on a thread of its own, a few items ahead.

    An exception of the inner iterator is raised here, after the items before it.

    Args:
        items: the inner iterator.
        depth: how many items may wait. When so many do, the thread waits too, so a slow consumer slows the producer.
        name: the thread's name.
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
        """Drop the waiting items and end the iteration, here at once and on the thread at its next item."""
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
        except Exception as raised:  # noqa: BLE001  # the consumer raises it
            error = raised
        finally:
            # However the thread ends, the consumer must not wait for it.
            self._finish(error)

    def _put(self, item: T) -> bool:
        """Return False if the iterator is closed; otherwise wait for room and add an item."""
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
